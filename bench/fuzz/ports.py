"""Garbage against a UDP port of a real, running server: it must answer nothing larger than it was asked, and not grow.

    python -m bench fuzz --port pulse|dns [--count 10000000] [--seed 1]

A pool of datagrams is made once: random bytes, genuine ones with flipped bits, cut off, prolonged or with a field
replaced, and genuine ones, which are replays from their second time on. They are sent again and again, sorted by size,
no faster than the server reads (its queue in /proc/net/udp tells). Between batches a fresh genuine question must be
answered. Replies are held against the largest datagram of their batch, and where a nonce says which question they
answer, against that. Prints a table, appends it to bench/results/, and ends with 1 when anything is wrong.
"""

import os
import random
import socket
import sqlite3
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench import dns_seeds
from bench.ingest import KEY, Server, free_port, serving
from vpn_sentinel.wire import echo, pulse
from vpn_sentinel.wire.codec import encode
from vpn_sentinel.wire.messages import PROTOCOL, Exchange, Hello, Reports, Welcome

POOL = 100_000
SOURCES = 600
BATCH = 100  # datagrams between two looks at the server's queue
QUEUED = 60_000  # bytes of it that may wait
ZONE = "canary.example.org"
NAME, PROBE = "fuzz", "probe"
GROWTH_MB = 16.0  # more than that between a warm start and the end is a leak
HERE = Path(__file__).parents[1]


@dataclass
class Found:
    sent: int = 0
    replies: int = 0
    larger: int = 0
    largest: int = 0
    probes: int = 0
    probes_lost: int = 0


class Target:
    """A kind of port: what is genuine there, and how a fresh question is recognised as answered."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.ident = echo.ident_for(secret, NAME)
        self.key = echo.key_for(secret, self.ident)
        self.number = 0

    def seeds(self) -> list[bytes]:
        raise NotImplementedError

    def fresh(self) -> tuple[bytes, Callable[[bytes], bool]]:
        raise NotImplementedError

    def bound(self, reply: bytes, sizes: dict[bytes, int]) -> int | None:
        """The size of the question that a reply answers, None when it does not say."""
        raise NotImplementedError


class PulsePort(Target):
    def seeds(self) -> list[bytes]:
        made = []
        for n in range(2000):
            size = None if n % 2 else random.Random(n).randrange(echo.SIZE_BYTES, pulse.MAX_SIZE_BYTES + 1)
            made.append(pulse.request(self.ident, self.key, run=n % 7, number=n + 1, heard=n, silent=n, size=size))
        made += [echo.request(self.ident, n.to_bytes(8, "big"), self.key) for n in range(500)]
        return made

    def fresh(self) -> tuple[bytes, Callable[[bytes], bool]]:
        """Of another tunnel: the pool's many runs retire one another. Every second one has a size."""
        self.number += 1
        number, ident = self.number, echo.ident_for(self.secret, PROBE)
        key = echo.key_for(self.secret, ident)
        size = None if number % 2 else echo.SIZE_BYTES + number * 37 % (pulse.MAX_SIZE_BYTES - echo.SIZE_BYTES + 1)
        asked = pulse.request(ident, key, run=1, number=number, size=size)

        def answers(reply: bytes) -> bool:
            told = pulse.read_reply(reply, ident, 1, key)
            return told is not None and told[0] == number and len(reply) == len(asked)

        return asked, answers

    def bound(self, reply: bytes, sizes: dict[bytes, int]) -> int | None:
        return sizes.get(reply[8:24])


class DnsPort(Target):
    def seeds(self) -> list[bytes]:
        return list(dns_seeds.seeds(self.secret, ZONE))

    def fresh(self) -> tuple[bytes, Callable[[bytes], bool]]:
        self.number += 1
        own = dns_seeds.own_name(self.secret, ZONE, nonce=self.number.to_bytes(8, "big"), tunnel=NAME)
        asked = dns_seeds.question(own, dns_seeds.TXT, ident=self.number & 0xFFFF, opt=dns_seeds.edns())
        return asked, lambda reply: reply[:2] == asked[:2] and len(reply) > 12 and bool(reply[2] & 0x80)

    def bound(self, _reply: bytes, _sizes: dict[bytes, int]) -> int | None:
        return None


TARGETS: dict[str, type[Target]] = {"pulse": PulsePort, "dns": DnsPort}


def pool(seeds: Sequence[bytes], dice: random.Random, count: int = POOL) -> list[bytes]:
    """So many datagrams, sorted by size."""
    made = []
    for n in range(count):
        seed = bytearray(dice.choice(seeds))
        match n % 8:
            case 0:
                seed = bytearray(dice.randbytes(dice.randrange(0, 1600)))
            case 1:
                seed = bytearray(seed[: dice.randrange(1, 13)] + dice.randbytes(dice.randrange(0, 1460)))
            case 2 | 3:
                for _ in range(dice.randrange(1, 9)):
                    seed[dice.randrange(len(seed))] ^= 1 << dice.randrange(8)
            case 4:
                del seed[dice.randrange(len(seed)) :]
            case 5:
                seed += dice.randbytes(dice.randrange(1, 1600 - min(1500, len(seed))))
            case 6:
                at = dice.randrange(len(seed))
                piece = dice.choice((b"\0" * 8, b"\xff" * 8, dice.randbytes(8), bytes(dice.choice(seeds))[:16]))
                seed[at : at + len(piece)] = piece
            case _:
                pass  # genuine
        made.append(bytes(seed))
    return sorted(made, key=len)


class Queue:
    """What waits at a UDP port of this machine, as /proc/net/udp and udp6 tell it."""

    def __init__(self, port: int) -> None:
        self._mark = f":{port:04X}"

    def line(self) -> list[str]:
        for name in ("udp", "udp6"):  # a server for both versions stands in the second alone
            for line in Path("/proc/net", name).read_text(encoding="ascii").splitlines():
                fields = line.split()
                if fields[1].endswith(self._mark):
                    return fields
        raise RuntimeError("nobody listens on the port any more")

    def waiting(self) -> int:
        return int(self.line()[4].partition(":")[2], 16)

    def dropped(self) -> int:
        return int(self.line()[12])

    def wait(self, most: int) -> None:
        while self.waiting() > most:
            time.sleep(0.0005)


def fuzz(target: Target, port: int, count: int, dice: random.Random) -> Found:
    found = Found()
    datagrams = pool(target.seeds(), dice)
    sizes = {d[8:24]: len(d) for d in datagrams if len(d) >= 24}
    queue = Queue(port)
    with ExitStack() as ends:
        socks = [ends.enter_context(_source(n, port)) for n in range(SOURCES)]
        while found.sent < count:
            for start in range(0, len(datagrams), BATCH):
                batch, sock = datagrams[start : start + BATCH], dice.choice(socks)
                for datagram in batch:
                    sock.send(datagram)
                found.sent += len(batch)
                queue.wait(QUEUED)
                # A reply may answer the batch before, which was of the same size or smaller.
                _take(sock, target, sizes, len(batch[-1]), found)
                if start % (50 * BATCH) == 0:
                    queue.wait(0)
                    _probe(sock, target, sizes, len(batch[-1]), found)
                if found.sent >= count:
                    break
            queue.wait(0)
            time.sleep(0.01)
            for sock in socks:
                _take(sock, target, sizes, len(datagrams[-1]), found)
    return found


def _source(number: int, port: int) -> socket.socket:
    """A sender in a network of its own, so that limits for each sender leave work to do."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.bind((f"127.{number % 200 + 1}.{number // 200}.1", 0))
    sock.connect(("127.0.0.1", port))
    return sock


def _take(sock: socket.socket, target: Target, sizes: dict[bytes, int], most: int, found: Found) -> list[bytes]:
    got: list[bytes] = []
    while True:
        try:
            reply = sock.recv(65536)
        except BlockingIOError:
            return got
        except ConnectionRefusedError as e:
            raise RuntimeError("the server is gone") from e
        got.append(reply)
        found.replies += 1
        found.largest = max(found.largest, len(reply))
        bound = target.bound(reply, sizes)
        found.larger += len(reply) > (most if bound is None else bound)


def _probe(sock: socket.socket, target: Target, sizes: dict[bytes, int], most: int, found: Found) -> None:
    """Ask something genuine and new; three times, as an agent would."""
    found.probes += 1
    for _ in range(3):
        asked, answers = target.fresh()
        sock.send(asked)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            got = _take(sock, target, sizes, max(most, len(asked)), found)
            if any(answers(r) for r in got):
                return
            time.sleep(0.0005)
    found.probes_lost += 1


def greet(port: int, name: str) -> bytes:
    """Be greeted as an agent; returns the id told."""
    hello = Hello(protocol=PROTOCOL, client_id=name, spool="fuzz", version="0", interval=30.0, wall=time.time())
    body = encode(Exchange(hello=hello, reports=Reports(items=[])))
    headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/v1/agent", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        welcome = msgspec.json.decode(answer.read(), type=Welcome)
    assert welcome.echo is not None
    return bytes.fromhex(welcome.echo.id)


def metrics(port: int, prefix: str) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {k: int(float(v)) for k, _, v in (line.rpartition(" ") for line in lines) if k.startswith(prefix)}


def run(kind: str, count: int, seed: int) -> bool:
    api, health, dns = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="vs-fuzz-", dir="/var/tmp") as data:
        settings = serving(data, api, health)
        if kind == "dns":
            settings |= {
                "VPN_SENTINEL_CANARY_ZONE": ZONE,
                "VPN_SENTINEL_CANARY_PORT": str(dns),
                "VPN_SENTINEL_CANARY_HOST": "127.0.0.1",
                "VPN_SENTINEL_CANARY_ADDRESSES": "203.0.113.1",
            }
        server = Server("vpn-sentinel", [sys.executable, "-m", "vpn_sentinel", "server"], settings, api, "")
        try:
            told = greet(api, NAME)
            greet(api, PROBE)
            with sqlite3.connect(f"file:{data}/sentinel.db?mode=ro", uri=True) as db:
                secret = bytes.fromhex(db.execute("SELECT value FROM meta WHERE key = 'secret'").fetchone()[0])
            target = TARGETS[kind](secret)
            assert target.ident == told
            port = dns if kind == "dns" else api
            fuzz(TARGETS[kind](secret), port, POOL, random.Random(seed + 1))  # warm: caches and pools are full
            target.number = 1 << 20
            before, cpu, queue = server.rss_mb(), server.cpu(), Queue(port)
            dropped, began = queue.dropped(), time.monotonic()
            found = fuzz(target, port, count, random.Random(seed))
            took = time.monotonic() - began
            after, spent, lost = server.rss_mb(), server.cpu() - cpu, queue.dropped() - dropped
            counted = metrics(
                health, "vpn_sentinel_pulses_total" if kind == "pulse" else "vpn_sentinel_canary_queries_total"
            )
        finally:
            server.stop()
    good = not (found.larger or found.probes_lost) and after - before < GROWTH_MB
    write(kind, found, lost, took, spent, before, after, counted.items(), good=good)
    return good


def write(
    kind: str,
    found: Found,
    lost: int,
    took: float,
    spent: float,
    before: float,
    after: float,
    counted: Iterable[tuple[str, int]],
    *,
    good: bool,
) -> None:
    lines = [
        f"| fuzzed datagrams to the {kind} port | |",
        "|---|---|",
        f"| sent | {found.sent:,} in {took:.0f} s ({found.sent / took:,.0f} a second) |",
        f"| dropped by the kernel before the server read them | {lost:,} |",
        f"| CPU of the server for each | {1e6 * spent / found.sent:.1f} µs |",
        f"| replies | {found.replies:,}, the largest {found.largest} bytes |",
        f"| replies larger than their request | {found.larger} |",
        f"| genuine questions between, answered | {found.probes - found.probes_lost:,} of {found.probes:,} |",
        f"| RSS before and after | {before:.1f} MB, {after:.1f} MB |",
        *(f"| `{name}` since the start | {count:,} |" for name, count in counted),
        "",
        "As it must be." if good else "**Not as it must be.**",
    ]
    text = "\n".join(lines)
    print(text, flush=True)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"fuzz_{kind}.md").write_text(text + "\n", encoding="utf-8")


def main(kind: str, count: int, seed: int) -> None:
    if len(os.sched_getaffinity(0)) > 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the server has core 0
    if not run(kind, count, seed):
        sys.exit(1)
