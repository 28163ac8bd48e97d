"""Gives memory back to the system: what thousands of strangers made the process take is not for it to keep."""

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

_INTERVAL_S: Final = 20.0  # seconds
_MIN_GROWTH_BYTES: Final = 8_000_000  # bytes more than there were: to look through the heap takes some ten milliseconds
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def spare_the_collector() -> None:
    """What is loaded by now stays for ever: a full collection that walks it would stop every report for 50 ms."""
    gc.collect()
    gc.freeze()
    # A connection that ends is a cycle. Those that lived through a collection wait for a full one: after a million of
    # objects, as 20,000 connections leave behind, not after fifty millions.
    gc.set_threshold(50_000, 10, 2)


async def give_back() -> None:
    """Without end, where the C library can: glibc by itself gives back only what is free at the end of its heap, and
    of tens of megabytes one small object there keeps all.
    """
    if (trim := find_trim()) is None:
        return
    least = resident()
    while True:
        await asyncio.sleep(_INTERVAL_S)
        least = min(least, resident())
        if resident() > least + _MIN_GROWTH_BYTES:
            await asyncio.to_thread(trim, 0)
            least = resident()


def find_trim() -> Callable[[int], int] | None:
    """malloc_trim(3), which lets other threads of Python run meanwhile. musl has none."""
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def resident() -> int:
    """Bytes of memory that this process holds (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
