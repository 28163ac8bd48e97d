"""kill -9 at any moment: whatever was acknowledged is there, whatever was owed is delivered."""

import asyncio
import http.client
import http.server
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import observations, outbox, transitions, tunnels

KEY = "durability-key-0123456789"
HOME = "91.10.11.20"
EXIT = "185.65.134.10"
ENOUGH = 100  # reports, for the counts to say something
SENDERS = 8
# Between two reports of one sender, in seconds: each owes a delivery, and these go out one after the other.
PAUSE = 0.1


class Sink(http.server.ThreadingHTTPServer):
    """A webhook that refuses one time in ten, and keeps what it took."""

    daemon_threads = True

    def __init__(self) -> None:
        self.got: dict[str, set[str]] = defaultdict(set)
        self.kinds: Counter[str] = Counter()
        self.details: list[str] = []
        sink = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                fine = random.random() > 0.1
                if fine:
                    sink.kinds[body["kind"]] += 1
                    sink.details += body["details"]
                    sink.got[body["tunnel"]].add(self.headers["X-Sentinel-Delivery"])
                self.send_response(200 if fine else 500)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


class Server:
    """The real program, killed and started again."""

    def __init__(self, settings: dict[str, str], port: int) -> None:
        self.settings, self.port = settings, port
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vpn_sentinel", "server"],
            env={**os.environ, **self.settings},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise TimeoutError("the server did not start")

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Sender(threading.Thread):
    """An agent that turns from protected to leaking and back with every report, and goes on only when it has an ack."""

    def __init__(self, name: str, port: int) -> None:
        super().__init__(name=name, daemon=True)
        self.port, self.acked, self.stop = port, 0, threading.Event()

    def run(self) -> None:
        connection = None
        while not self.stop.is_set():
            try:
                connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                seq = self.acked + 1
                connection.request(
                    "POST",
                    "/api/v1/agent",
                    self.body(seq),
                    {"X-API-Key": KEY, "Content-Type": "application/json"},
                )
                answer = connection.getresponse()
                said = json.loads(answer.read())
                if answer.status == 200:
                    assert said["ack"] >= seq
                    self.acked = seq
                    self.stop.wait(PAUSE)
                elif answer.status not in (429, 503):
                    raise AssertionError(said)
            except (OSError, http.client.HTTPException, json.JSONDecodeError):
                if connection is not None:
                    connection.close()
                connection = None
                time.sleep(0.02)
        if connection is not None:
            connection.close()

    def body(self, seq: int) -> str:
        address = HOME if leaks(seq) else EXIT
        canary = {"probe": "default", "target": "echo", "family": 4, "answer": "answered", "address": address}
        hello = {
            "type": "hello",
            "protocol": 1,
            "client_id": self.name,
            "spool": "a-spool",
            "version": "t",
            "interval": 60,
            "wall": time.time(),
            "policy": {"home_networks": [HOME + "/32"]},
        }
        observation = {"trigger": "timer", "canaries": [canary], "link": {"name": "wg0", "present": True, "up": True}}
        reports = {"type": "reports", "items": [{"seq": seq, "age": 0.0, "observation": observation}]}
        return json.dumps({"type": "exchange", "hello": hello, "reports": reports})


def leaks(seq: int) -> bool:
    return seq % 2 == 0


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_nothing_acknowledged_is_lost_on_sqlite(database_url: str, tmp_path: Path) -> None:
    await killed_again_and_again(database_url, tmp_path, kills=20)


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_nothing_acknowledged_is_lost_on_postgres(database_url: str, tmp_path: Path) -> None:
    await killed_again_and_again(database_url, tmp_path, kills=5)


async def killed_again_and_again(url: str, folder: Path, kills: int) -> None:
    sink = Sink()
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    ports = [free_port() for _ in range(3)]
    server = Server(settings(url, folder, ports, sink.server_port), ports[0])
    server.start()
    server.wait()
    senders = [Sender(f"tunnel-{i}", ports[0]) for i in range(SENDERS)]
    for sender in senders:
        sender.start()
    rng = random.Random()
    for _ in range(kills):
        before = sum(s.acked for s in senders)
        wait_until(lambda b=before: sum(s.acked for s in senders) > b + SENDERS, 30, "reports are taken")
        await asyncio.sleep(rng.uniform(0.0, 0.4))
        server.kill()
        server.start()
    wait_until(lambda: server_answers(ports[0]), 30, "the server is back")
    wait_until(lambda: sum(s.acked for s in senders) > ENOUGH, 60, "enough reports are taken")
    for sender in senders:
        sender.stop.set()
    for sender in senders:
        sender.join(15)
    store = await open_store(url)
    try:
        await delivered(store)
        await nothing_is_missing(store, senders, sink)
    finally:
        server.kill()
        await store.close()
        sink.shutdown()
        sink.server_close()


async def delivered(store: Any) -> None:
    """Wait until all that is owed has gone out."""
    async with asyncio.timeout(120):
        # Another process delivers, so there is no event to wait for.
        while await store.read(select(outbox.c.id).where(outbox.c.settled_at.is_(None)).limit(1)):  # noqa: ASYNC110
            await asyncio.sleep(0.2)


async def nothing_is_missing(store: Any, senders: list[Sender], sink: Sink) -> None:
    ids = {r.name: r.id for r in await store.read(select(tunnels.c.id, tunnels.c.name))}
    assert sum(s.acked for s in senders) > ENOUGH
    for sender in senders:
        tunnel = ids[sender.name]
        seqs = {r.seq for r in await store.read(select(observations.c.seq).where(observations.c.tunnel_id == tunnel))}
        assert seqs >= set(range(1, sender.acked + 1)), "an acknowledged observation is gone"
        moves = await store.read(
            select(transitions.c.old, transitions.c.new)
            .where(transitions.c.tunnel_id == tunnel)
            .order_by(transitions.c.id)
        )
        # Every report turns the state, so there are as many transitions as reports, each following the one before.
        assert len(moves) == len(seqs), "a transition is missing, or was made twice"
        assert all(a.new == b.old for a, b in itertools.pairwise(moves))
        owed = await store.read(select(outbox.c.id, outbox.c.outcome).where(outbox.c.tunnel == sender.name))
        assert len(owed) == len(moves), "a transition owes exactly one delivery"
        # A sender says more in a minute than people are told one by one.
        assert {r.outcome for r in owed} <= {"done", "summed"}
        assert {str(r.id) for r in owed if r.outcome == "done"} <= sink.got[sender.name], "a delivery never arrived"


def settings(url: str, folder: Path, ports: list[int], sink: int) -> dict[str, str]:
    return {
        "VPN_SENTINEL_DATABASE_URL": url,
        "VPN_SENTINEL_DATA_DIR": str(folder),
        "VPN_SENTINEL_API_KEY": KEY,
        "VPN_SENTINEL_SERVER_HOST": "127.0.0.1",
        "VPN_SENTINEL_SERVER_API_PORT": str(ports[0]),
        "VPN_SENTINEL_SERVER_HEALTH_PORT": str(ports[1]),
        "VPN_SENTINEL_SERVER_DASHBOARD_PORT": str(ports[2]),
        "VPN_SENTINEL_SERVER_RATE_LIMIT_REQUESTS": "1000000",
        "VPN_SENTINEL_GRACE_RECOVERY": "0",
        "VPN_SENTINEL_FLAP_CALM": "0",
        "VPN_SENTINEL_WEBHOOK_URL": f"http://127.0.0.1:{sink}/hook",
        "VPN_SENTINEL_WEBHOOK_ALLOW_PRIVATE": "true",
        "VPN_SENTINEL_TRACE_URL": "http://127.0.0.1:9",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def server_answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Any, limit: float, what: str) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.01)
