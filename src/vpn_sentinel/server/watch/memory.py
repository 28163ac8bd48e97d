"""Returns free memory to the system, so that a flood of connections does not enlarge the process for good."""

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

_INTERVAL_S: Final = 20.0
_MIN_GROWTH_BYTES: Final = 8_000_000  # less is not worth a trim of the heap, which takes about 10 ms
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def freeze_gc() -> None:
    """Exclude all loaded objects from garbage collection: a full one would stop every report for 50 ms."""
    gc.collect()
    gc.freeze()
    # A closed connection is a reference cycle. One that survived a collection is freed by a full one: with these
    # thresholds after a million objects, which 20,000 connections leave, and not after fifty million.
    gc.set_threshold(50_000, 10, 2)


async def trim_heap() -> None:
    """Trim the heap for ever, where the C library can: glibc by itself returns only free memory at the end of its heap,
    and one small object there can hold tens of megabytes.
    """
    if (trim := find_malloc_trim()) is None:
        return
    least = resident_bytes()
    while True:
        await asyncio.sleep(_INTERVAL_S)
        least = min(least, resident_bytes())
        if resident_bytes() > least + _MIN_GROWTH_BYTES:
            await asyncio.to_thread(trim, 0)
            least = resident_bytes()


def find_malloc_trim() -> Callable[[int], int] | None:
    """malloc_trim(3), which releases the GIL while it runs; None with musl, which has none."""
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def resident_bytes() -> int:
    """Bytes of memory that this process holds (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
