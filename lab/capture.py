"""Packets that really passed, seen from outside the program under test."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

from lab.nodes import Node, Process, until

_LINE = re.compile(
    r"^(?P<time>\d+\.\d+) (?:(?P<if>\S+) +(?:In|Out|[BMP]) +)?IP6? (?P<src>\S+) > (?P<dst>\S+): (?P<rest>.*)$"
)


_numbers = itertools.count(1)


@dataclass(frozen=True)
class Packet:
    """One captured packet; src and dst are addresses, ports None where the protocol has none."""

    time: float
    src: str
    sport: int | None
    dst: str
    dport: int | None
    text: str


class Capture:
    """A running tcpdump."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def packets(self) -> list[Packet]:
        """Everything captured so far."""
        lines = self._process.output().splitlines()
        return [packet for line in lines if (packet := _parse(line)) is not None]

    def settle(self, quiet: float = 0.1, timeout: float = 2) -> None:
        """Wait until the kernel's buffer has been written out: until nothing new came for a moment."""
        end = time.monotonic() + timeout
        seen, since = -1, time.monotonic()
        while time.monotonic() < end and time.monotonic() - since < quiet:
            size = self._process.log.stat().st_size
            if size != seen:
                seen, since = size, time.monotonic()
            time.sleep(0.01)


@contextlib.contextmanager
def capture(node: Node, expression: str, interface: str) -> Iterator[Capture]:
    """tcpdump on one interface of a node while the block runs; read `.packets()` inside or after it."""
    command = ["tcpdump", "-nn", "-tt", "-l", "--immediate-mode", "-p", "-s", "200", "-i", interface, expression]
    process = node.spawn(command, log=f"tcpdump-{next(_numbers)}")
    try:
        until(lambda: "listening on" in process.output() or process.poll() is not None, 10, "tcpdump")
        if process.poll() is not None:
            raise RuntimeError(f"tcpdump: {process.output()}")
        running = Capture(process)
        yield running
        running.settle()
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _parse(line: str) -> Packet | None:
    match = _LINE.match(line)
    if match is None:
        return None
    src, sport = _split(match["src"])
    dst, dport = _split(match["dst"])
    return Packet(float(match["time"]), src, sport, dst, dport, match["rest"])


def _split(text: str) -> tuple[str, int | None]:
    """tcpdump writes address.port, for both families."""
    address, _, port = text.rpartition(".")
    if ":" in text:
        return (address, int(port)) if address else (text, None)
    return (address, int(port)) if text.count(".") == 4 else (text, None)
