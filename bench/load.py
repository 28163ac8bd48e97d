"""A load generator for one HTTP route: many connections, one request in flight on each, latencies kept.

A server that closes after each answer, as Flask's does, is connected to anew: that is its price, not the load's.

Runs as a process of its own: `python -m bench.load PORT PATH CONNECTIONS SECONDS NAMES KEY` prints one JSON object.
"""

import asyncio
import json
import sys
import time

import uvloop

_FIELDS = (
    '"status":"alive","public_ip":"185.65.134.10","location":{"country":"NL","city":"Amsterdam","org":"AS39351 VPN"}'
)


def request(path: str, key: str, name: str) -> bytes:
    body = f'{{"client_id":"{name}","timestamp":"{time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}",{_FIELDS}}}'
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


class Client(asyncio.Protocol):
    """Sends the next request when the answer to the last is complete."""

    def __init__(self, run: "Run", first: int) -> None:
        self.run, self.next, self.buffer, self.sent = run, first, b"", 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        name = f"tunnel-{self.next % self.run.names}"
        self.next += self.run.connections
        self.sent = time.perf_counter()
        self.transport.write(request(self.run.path, self.run.key, name))  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lower = head.lower()
        start = lower.find(b"content-length:")
        length = int(lower[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        self.run.note(head[9:12] == b"200", time.perf_counter() - self.sent)
        if time.perf_counter() < self.run.end and b"connection: close" not in lower:
            self.send()
        else:
            self.transport.close()

    def connection_lost(self, _exc: Exception | None) -> None:
        self.buffer = b""
        if time.perf_counter() < self.run.end:
            self.run.connect(self)
        else:
            self.run.closed()


class Run:
    def __init__(self, path: str, key: str, connections: int, seconds: float, names: int) -> None:
        self.path, self.key, self.connections, self.names = path, key, connections, names
        self.latencies: list[float] = []
        self.refused = 0
        self.open = connections
        self.start = time.perf_counter()
        self.end = self.start + seconds
        self.done = asyncio.Event()
        self.tasks: asyncio.TaskGroup | None = None
        self.port = 0

    def connect(self, client: "Client") -> None:
        assert self.tasks is not None
        loop = asyncio.get_running_loop()
        self.tasks.create_task(loop.create_connection(lambda: client, "127.0.0.1", self.port))

    def note(self, ok: bool, seconds: float) -> None:
        if ok:
            self.latencies.append(seconds)
        else:
            self.refused += 1

    def closed(self) -> None:
        self.open -= 1
        if not self.open:
            self.done.set()


async def load(port: int, path: str, connections: int, seconds: float, names: int, key: str) -> dict[str, float]:
    run = Run(path, key, connections, seconds, names)
    run.port = port
    async with asyncio.timeout(seconds + 30), asyncio.TaskGroup() as run.tasks:
        for i in range(connections):
            run.connect(Client(run, i))
        await run.done.wait()
    took = time.perf_counter() - run.start
    ordered = sorted(run.latencies) or [0.0]
    return {
        "requests": len(run.latencies),
        "refused": run.refused,
        "per_second": len(run.latencies) / took,
        "p50_ms": 1000 * ordered[len(ordered) // 2],
        "p99_ms": 1000 * ordered[int(len(ordered) * 0.99)],
        "worst_ms": 1000 * ordered[-1],
    }


if __name__ == "__main__":
    port, path, connections, seconds, names, key = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(load(int(port), path, int(connections), float(seconds), int(names), key))))
