"""What a pulse costs the server, beside a UDP echo on the same loop that does nothing else.

    python -m bench pulse [--idents 10000] [--seconds 3]

A real server on core 0 and a bare uvloop echo on core 0 take turns, the load comes from core 1: genuine pulses of so
many agents, as fast as they are answered. From the CPU for each pulse follows what 10,000 agents at one pulse every
two seconds take of one core; that rate is then sent, and measured too.
"""

import argparse
import os
import socket
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.fuzz.ports import Queue, metrics
from bench.ingest import Server, free_port, serving
from vpn_sentinel.wire import echo, pulse

EVERY = 1.0  # seconds between an agent's pulses at its default settings
ROUNDS = 3
BATCH = 64
HERE = Path(__file__).parent
BARE = """
import asyncio, sys, uvloop

class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport): self.transport = transport
    def datagram_received(self, data, addr): self.transport.sendto(data, addr)

async def serve():
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(Echo, local_addr=("127.0.0.1", int(sys.argv[1])))
    await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", int(sys.argv[1]))
    await asyncio.sleep(1e6)

asyncio.Runner(loop_factory=uvloop.new_event_loop).run(serve())
"""


class Agents:
    """So many agents' pulses; `datagrams` makes one of each, all of them new."""

    def __init__(self, secret: bytes, names: Sequence[str]) -> None:
        self._keys = [(i, echo.key_for(secret, i)) for i in (echo.ident_for(secret, n) for n in names)]
        self._number = 0

    def datagrams(self) -> list[bytes]:
        self._number += 1
        n = self._number
        return [pulse.request(i, k, run=7, number=n, heard=n - 1, silent=2000) for i, k in self._keys]


def load(agents: Agents, server: Server, seconds: float, rate: float | None = None) -> dict[str, float]:
    """Send pulses, at `rate` a second or as fast as they are read; what that cost."""
    queue, sent, answered, spent, cpu = Queue(server.port), 0, 0, 0.0, 0.0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        sock.connect(("127.0.0.1", server.port))
        while spent < seconds:
            datagrams = agents.datagrams()  # made outside of what is measured
            before, began = server.cpu(), time.perf_counter()
            for start in range(0, len(datagrams), BATCH):
                for datagram in datagrams[start : start + BATCH]:
                    sock.send(datagram)
                queue.wait(40_000)
                if rate is not None:
                    time.sleep(max(0.0, began + (start + BATCH) / rate - time.perf_counter()))
                answered += _count(sock)
            queue.wait(0)
            spent += time.perf_counter() - began
            time.sleep(0.05)
            cpu += server.cpu() - before
            answered += _count(sock)
            sent += len(datagrams)
    return {
        "per_second": sent / spent,
        "answered": answered / sent,
        "cpu_us": 1e6 * cpu / sent,
        "core_percent": 100 * cpu / spent,
    }


def _count(sock: socket.socket) -> int:
    got = 0
    while True:
        try:
            sock.recv(2048)
        except BlockingIOError:
            return got
        got += 1


def know(data: str, count: int) -> tuple[bytes, list[str]]:
    """Put so many tunnels into the database of a server that is stopped; returns its secret and their names."""
    names = [f"tunnel-{n}" for n in range(count)]
    with sqlite3.connect(f"{data}/sentinel.db") as db:
        needed = [row for row in db.execute("PRAGMA table_info(tunnels)") if row[3] and row[4] is None and not row[5]]
        values = {name: 0 if kind in ("FLOAT", "INTEGER") else "" for _, name, kind, *_ in needed}
        columns = list(values)
        marks = ", ".join("?" for _ in columns)
        db.executemany(
            f"INSERT INTO tunnels ({', '.join(columns)}) VALUES ({marks})",
            [[({**values, "name": n, "state": "pending"})[c] for c in columns] for n in names],
        )
        secret = bytes.fromhex(db.execute("SELECT value FROM meta WHERE key = 'secret'").fetchone()[0])
    return secret, names


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--idents", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args(words)
    api, health, bare = free_port(), free_port(), free_port()
    if len(os.sched_getaffinity(0)) > 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="vs-bench-", dir="/var/tmp") as data:
        settings = serving(data, api, health)
        command = [sys.executable, "-m", "vpn_sentinel", "server"]
        Server("vpn-sentinel", command, settings, api, "").stop()  # makes the database
        secret, names = know(data, given.idents)
        own = Server("vpn-sentinel", command, settings, api, "")
        other = Server("bare uvloop echo", [sys.executable, "-c", BARE, str(bare)], {}, bare, "")
        try:
            agents = Agents(secret, names)
            for server in (own, other):
                load(agents, server, 1.0)  # warm: the server notes where each comes from
            time.sleep(5.0)
            rounds: dict[str, list[dict[str, float]]] = {s.name: [] for s in (own, other)}
            for _ in range(ROUNDS):
                for server in (own, other):
                    rounds[server.name].append(load(agents, server, given.seconds))
            usual = load(agents, own, 4 * given.seconds, rate=given.idents / EVERY)
            rss = own.rss_mb()
            counted = metrics(health, "vpn_sentinel_pulses_total")
        finally:
            own.stop()
            other.stop()
    report(rounds, usual, rss, given.idents, counted)


def report(
    rounds: dict[str, list[dict[str, float]]], usual: dict[str, float], rss: float, idents: int, counted: dict[str, int]
) -> None:
    middle = {n: {k: statistics.median(f[k] for f in figures) for k in figures[0]} for n, figures in rounds.items()}
    bare = middle["bare uvloop echo"]["cpu_us"]
    lines = ["| server | pulses/s | answered | CPU for each | beside the bare one |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {f['per_second']:,.0f} | {100 * f['answered']:.1f} % | {f['cpu_us']:.1f} µs "
        f"| {f['cpu_us'] / bare:.2f}x |"
        for name, f in middle.items()
    ]
    lines += [
        "",
        f"{idents:,} agents with one pulse every {EVERY:g} s each ({usual['per_second']:,.0f} a second) take "
        f"{usual['core_percent']:.1f} % of one core, measured at that rate; {100 * usual['answered']:.1f} % answered. "
        f"Server: {rss:.0f} MB RSS; {', '.join(f'{k} {v:,}' for k, v in counted.items() if v)}. "
        f"Medians of {ROUNDS}, in turns.",
    ]
    text = "\n".join(lines)
    print(text)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "pulse.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
