"""Honest agents over WebSockets, in a process of their own: `python -m bench.siege.honest PORT KEY COUNT INTERVAL TLS`.

Each reports every INTERVAL seconds. For each line of its input it prints one JSON object: how long reports took until
they were acknowledged, in seconds, and how many connections were lost, since the last line.
"""

import asyncio
import json
import secrets
import ssl
import sys
import time
from collections.abc import Sequence
from typing import Any

import websockets

EXIT, HOME = "185.65.134.10", "91.10.10.20"
NETWORKS = 200  # from which they come


def hello(name: str, interval: float) -> str:
    said = {"type": "hello", "protocol": 1, "client_id": name, "spool": secrets.token_hex(4), "version": "2.0.0"}
    policy = {"home_networks": [f"{HOME}/32"]}
    return json.dumps(said | {"interval": interval, "wall": time.time(), "policy": policy})


def item(seq: int, *, address: str | None = None, up: bool = True, age: float = 0.0) -> dict[str, Any]:
    """One observation of a tunnel that comes out at `address`, or of one whose device is down."""
    address = address or EXIT
    path = "tunnel" if address == EXIT else "outside"
    canary: dict[str, Any] = {"probe": "default", "target": "cloudflare", "family": 4, "answer": "answered"}
    canary |= {"path": path, "address": address, "rtt_ms": 20.0}
    if not up:
        canary = {"probe": "default", "target": "cloudflare", "family": 4, "answer": "lost", "path": "tunnel"}
    link = {"name": "wg0", "present": True, "up": up, "rx_bytes": seq * 1000, "tx_bytes": seq * 1000}
    seen = {"trigger": "timer", "link": link, "canaries": [canary]}
    return {"seq": seq, "age": age, "observation": seen}


def reports(items: Sequence[dict[str, Any]], pending: int = 0) -> str:
    """One message of them, while `pending` more wait."""
    return json.dumps({"type": "reports", "pending": pending, "items": list(items)})


def report(seq: int, *, address: str | None = None, up: bool = True, age: float = 0.0) -> str:
    """A message of one `item`."""
    return reports([item(seq, address=address, up=up, age=age)])


class Agent:
    """Reports until `stopped` what `state` says, the arguments of `report`; None is nothing.

    By the monotonic clock, `heard_at` is when the first was acknowledged, `said_at` when it began to send the last that
    was.
    """

    def __init__(self, port: int, key: str, name: str, interval: float, *, tls: bool, host: str = "127.0.0.1") -> None:
        self.url = f"{'wss' if tls else 'ws'}://127.0.0.1:{port}/api/v1/agent"
        self.key, self.name, self.interval, self.host = key, name, interval, host
        self.ssl = ssl._create_unverified_context() if tls else None  # noqa: SLF001 - of this machine
        self.seq, self.lost, self.said_at, self.heard_at = 0, 0, 0.0, 0.0
        self.took: list[float] = []
        self.state: dict[str, Any] | None = {}
        self.echo: dict[str, Any] = {}
        self.turned, self.stopped = asyncio.Event(), asyncio.Event()

    def turn(self, state: dict[str, Any] | None) -> None:
        """Report another state from now on, and at once."""
        self.state = state
        self.turned.set()

    async def run(self, first_after: float = 0.0) -> None:
        """Connect anew where the connection is lost."""
        await asyncio.sleep(first_after)
        while not self.stopped.is_set():
            try:
                async with websockets.connect(
                    self.url, additional_headers={"X-API-Key": self.key}, open_timeout=20, compression=None,
                    local_addr=(self.host, 0), ssl=self.ssl, proxy=None, ping_interval=None,
                ) as socket:  # fmt: skip
                    await socket.send(hello(self.name, self.interval))
                    self.echo = json.loads(await socket.recv())["echo"]
                    await self._report(socket)
            except (OSError, websockets.WebSocketException):
                self.lost += 1
                await asyncio.sleep(0.5)

    async def _report(self, socket: Any) -> None:
        while not self.stopped.is_set():
            if self.state is not None:
                self.seq += 1
                began = time.monotonic()
                await socket.send(report(self.seq, **self.state))
                await socket.recv()
                self.said_at, self.heard_at = began, self.heard_at or time.monotonic()
                self.took.append(time.monotonic() - began)
            try:
                async with asyncio.timeout(self.interval):
                    await self.turned.wait()
                self.turned.clear()
            except TimeoutError:
                continue


async def main(port: int, key: str, count: int, interval: float, tls: bool) -> None:
    agents = [
        Agent(port, key, f"honest-{n}", interval, tls=tls, host=f"127.200.{n % NETWORKS}.1") for n in range(count)
    ]
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running = [loop.create_task(agent.run(interval * n / count)) for n, agent in enumerate(agents)]
    while await reader.readline():
        took = sorted(t for agent in agents for t in agent.took)
        figures: dict[str, float] = {"reports": len(took), "lost": sum(a.lost for a in agents)}
        figures |= {f"p{p}": round(took[min(len(took) - 1, len(took) * p // 100)], 4) for p in (50, 99, 100) if took}
        for agent in agents:
            agent.took, agent.lost = [], 0
        print(json.dumps(figures), flush=True)
    for task in running:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5] == "tls"))
