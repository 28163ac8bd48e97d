"""The server's clock is set while it runs, by libfaketime, for its process alone: nothing lasts longer or shorter.

On PostgreSQL the database's clock counts, which is set too, and the server's own may say what it likes.
"""

import contextlib
import http.client
import http.server
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import POSTGRES_BINARIES, Postgres, open_folder

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
KEY = "a-key-for-clocks-0123456789"
HOME, EXIT = "91.10.11.20", "185.65.134.10"
INTERVAL = 2.0
SILENT_AFTER = 3 * INTERVAL + 1.0
GRACE = 3.0
# Seconds for a report, a message, and the server's looks, on a machine that does other things too.
SLACK = 8.0
# What a server whose clock was set forward may wait longer: it may have been paused, and its agents with it.
RETURN = 45.0
HOUR, YEARS = 3600, 10 * 365 * 86400

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed: `make test` as root installs it"),
]


class Sink(http.server.ThreadingHTTPServer):
    """A webhook that keeps what it was told, and when by a clock that never jumps."""

    daemon_threads = True

    def __init__(self) -> None:
        self.told: list[tuple[float, str, dict[str, Any]]] = []
        told = self.told

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                told.append((time.monotonic(), body["kind"], body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


class Agent(threading.Thread):
    """Reports every half second what `sees` says, while it is something."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.stop = port, threading.Event()
        self.sees: str | None = EXIT
        self._seqs = itertools.count(1)

    def run(self) -> None:
        while not self.stop.wait(0.5):
            if self.sees is not None:
                with contextlib.suppress(OSError, http.client.HTTPException):  # the server is being started
                    self.report(self.sees)

    def report(self, address: str) -> None:
        answered = {"answer": "answered", "address": address} if address else {"answer": "lost"}
        hello = {
            "type": "hello", "protocol": 1, "client_id": "nl", "spool": "a-spool", "version": "t",
            "interval": INTERVAL, "wall": time.time(), "policy": {"home_networks": [HOME + "/32"]},
        }  # fmt: skip
        seen = {
            "trigger": "timer", "canaries": [{"probe": "default", "target": "echo", "family": 4, **answered}],
            "link": {"name": "wg0", "present": True, "up": True},
        }  # fmt: skip
        reports = {"type": "reports", "items": [{"seq": next(self._seqs), "age": 0.0, "observation": seen}]}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            body = json.dumps({"type": "exchange", "hello": hello, "reports": reports})
            headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
            connection.request("POST", "/api/v1/agent", body, headers)
            answer = connection.getresponse()
            said = answer.read()
        finally:
            connection.close()
        assert answer.status == 200, said


class House:
    """The real server with one tunnel, a webhook, and a clock of its own."""

    def __init__(self, url: str, folder: Path) -> None:
        self._offset = folder / "clock"
        self.set(0)
        self.log = folder / "log"
        self._log = self.log.open("ab")
        self._heard = 0
        self.sink = Sink()
        threading.Thread(target=self.sink.serve_forever, daemon=True).start()
        port, health, dashboard = (free_port() for _ in range(3))
        self._env = {
            **os.environ,
            **faked(self._offset),
            "VPN_SENTINEL_DATABASE_URL": url,
            "VPN_SENTINEL_DATA_DIR": str(folder),
            "VPN_SENTINEL_API_KEY": KEY,
            "VPN_SENTINEL_SERVER_HOST": "127.0.0.1",
            "VPN_SENTINEL_SERVER_API_PORT": str(port),
            "VPN_SENTINEL_SERVER_HEALTH_PORT": str(health),
            "VPN_SENTINEL_SERVER_DASHBOARD_PORT": str(dashboard),
            "VPN_SENTINEL_SERVER_RATE_LIMIT_REQUESTS": "1000000",
            "VPN_SENTINEL_GRACE_DOWN": str(GRACE),
            "VPN_SENTINEL_GRACE_RECOVERY": str(GRACE),
            "VPN_SENTINEL_WEBHOOK_URL": f"http://127.0.0.1:{self.sink.server_port}/hook",
            "VPN_SENTINEL_WEBHOOK_ALLOW_PRIVATE": "true",
            "VPN_SENTINEL_TRACE_URL": "http://127.0.0.1:9",
        }
        self._port = port
        self.agent = Agent(port)

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vpn_sentinel", "server"],
            env=self._env,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        wait_until(lambda: answers(self._port), 60, "the server starts")

    def restart(self, by: int) -> None:
        """Stop, and start with a clock that was set `by` so many seconds meanwhile."""
        self._process.terminate()
        self._process.wait()
        self.set(by)
        self.start()
        self.hears("server_started", 20)

    def set(self, by: int) -> float:
        """Set the server's clock `by` seconds off; when that was, by a clock that never jumps."""
        set_clock(self._offset, by)
        return time.monotonic()

    def close(self) -> None:
        self.agent.stop.set()
        if self.agent.is_alive():
            self.agent.join(15)
        self._process.terminate()
        self._process.wait()
        self._log.close()
        self.sink.shutdown()
        self.sink.server_close()

    def hears(self, kind: str, within: float) -> tuple[float, dict[str, Any]]:
        """When the next notice came, which must be of that kind, and what it says."""
        wait_until(lambda: len(self.sink.told) > self._heard, within, f"{kind} is told")
        at, told, body = self.sink.told[self._heard]
        self._heard += 1
        assert told == kind, body
        return at, body


@pytest.fixture
def house(database_url: str, tmp_path: Path) -> Iterator[House]:
    house = House(database_url, tmp_path)
    with closing(house):
        begin(house)
        yield house


STEPS = pytest.mark.parametrize(
    "by", [-HOUR, HOUR, -YEARS, YEARS], ids=["an hour back", "an hour on", "10 years back", "10 years on"]
)


@STEPS
def test_a_running_servers_clock_is_set(house: House, by: int) -> None:
    house.agent.sees = HOME
    leaking, _ = house.hears("leaking", SLACK)
    time.sleep(2.0)

    house.set(by)
    time.sleep(2.0)
    healed = time.monotonic()
    house.agent.sees = EXIT
    at, said = house.hears("recovered", GRACE + SLACK)
    assert at - healed >= GRACE - 0.5
    assert said["outage_seconds"] == pytest.approx(healed - leaking, abs=SLACK)

    # Back again while a grace runs: neither cut short nor drawn out.
    dead = time.monotonic()
    house.agent.sees = ""
    time.sleep(GRACE / 2)
    house.set(0)
    at, _ = house.hears("down", GRACE + SLACK)
    assert at - dead >= GRACE - 0.5
    house.agent.sees = EXIT
    house.hears("recovered", GRACE + SLACK)

    # And a silence.
    house.agent.sees = None
    time.sleep(SILENT_AFTER / 2)
    asked = house.set(by)
    at, _ = house.hears("silent", (RETURN if by > 0 else SILENT_AFTER) + SLACK)
    assert at - asked >= SILENT_AFTER / 2 - 1.0


@STEPS
def test_a_clock_is_set_while_the_server_is_away(house: House, by: int) -> None:
    house.agent.sees = HOME
    house.hears("leaking", SLACK)
    house.agent.sees = None
    time.sleep(1.0)
    house.restart(by)
    house.agent.sees = EXIT
    house.hears("recovered", GRACE + SLACK)
    house.agent.sees = ""
    house.hears("down", GRACE + SLACK)
    house.agent.sees = None
    house.hears("silent", RETURN + SLACK)


@STEPS
def test_the_databases_clock_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: int) -> None:
    if not POSTGRES_BINARIES:
        pytest.skip("PostgreSQL is not installed: `make test` as root installs it")
    folder = open_folder("vs-clock-")
    cluster = Postgres(folder, POSTGRES_BINARIES[0])
    try:
        set_clock(folder / "clock", 0)
        with monkeypatch.context() as patch:
            for name, value in faked(folder / "clock").items():
                patch.setenv(name, value)
            cluster.start()
        with closing(House(cluster.new_database(), tmp_path)) as house:
            begin(house)
            dead = time.monotonic()
            house.agent.sees = ""
            time.sleep(GRACE / 2)
            set_clock(folder / "clock", by)
            at, _ = house.hears("down", GRACE + SLACK)
            assert at - dead >= GRACE - 0.5
            assert f"the clock was set: all open times move with it seconds={by:+d}" in house.log.read_text()
            house.agent.sees = EXIT
            house.hears("recovered", GRACE + SLACK)
            house.agent.sees = None
            house.hears("silent", RETURN + SLACK)
        cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def faked(offset: Path) -> dict[str, str]:
    """The environment of a program whose wall clock is off by what the file says."""
    return {
        "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip


def set_clock(offset: Path, by: int) -> None:
    # Renamed, so that nobody reads half of it.
    whole = offset.with_suffix(".new")
    whole.write_text(f"{by:+d}s\n")
    whole.replace(offset)


def begin(house: House) -> None:
    house.start()
    house.agent.start()
    house.hears("server_started", 20)
    house.hears("connected", 20)


def answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(condition: Any, limit: float, what: str) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)
