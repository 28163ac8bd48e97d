"""One installation of a server, in a network namespace of the thread's own: started, killed, started again, asked."""

import asyncio
import contextlib
import ctypes
import http.client
import itertools
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import asyncpg

from bench.kills.steps import Stepped
from lab.outside.service import Listener
from lab.outside.sinks import Webhook
from lab.outside.telegram import Telegram
from tests.integration.test_durability import KEY, Sender, settings
from vpn_sentinel.server.store import backup

PROGRAM: Final = (sys.executable, "-m", "vpn_sentinel")
API, HEALTH, DASHBOARD, HOOK, BOT = 5000, 8081, 8080, 9000, 9001  # in its own namespace, none is taken
CHAT: Final = 4000
LIMIT: Final = 30.0  # seconds for a start
TELL: Final = 90.0  # seconds until people are told, who hear of one tunnel 30 times a minute at most
LATE: Final = 1.0  # seconds that a step may come later than it did when they were counted
_CLONE_NEWNET: Final = 0x40000000
_OURS: Final = {"sentinel.db", "sentinel.db-wal", "sentinel.db-shm"}


class _Receivers(threading.local):
    """Of one thread, in its namespace: they outlast its servers."""

    webhook: Webhook
    telegram: Telegram


_receivers = _Receivers()


def own_namespace() -> None:
    """Have the calling thread, and what it starts, in a new network namespace (unshare(2)), with a webhook and a Bot
    API. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    _receivers.webhook, _receivers.telegram = Webhook(), Telegram()
    Listener("127.0.0.1", HOOK, _receivers.webhook)
    Listener("127.0.0.1", BOT, _receivers.telegram)


class Unstartable(Exception):
    """What it says of itself."""


class Stand:
    """`url` is an empty database. `lost`, `wrong` and `times` are what was found, and seconds that starts took."""

    def __init__(self, url: str, folder: Path, at: int | None) -> None:
        """`at` is the step to be killed at; None for all steps, and a kill after the last of them."""
        self.url, self.folder, self.at = url, folder, at
        self.lost, self.wrong, self.times = list[str](), list[str](), list[float]()
        self.twice, self.last, self.steps = 0, "", list[str]()
        self.how = "not killed"
        self.out, self.log = folder / "out", folder / "log"
        self.log.touch()
        self.data = folder / "data"
        self.data.mkdir()
        self.database = self.data / "sentinel.db" if url.startswith("sqlite") else None
        self.webhook, self.telegram = _receivers.webhook, _receivers.telegram
        self.webhook.forget()
        self.telegram.forget()
        clean = {k: v for k, v in os.environ.items() if not k.startswith("VPN_SENTINEL")}
        self.env = clean | settings(url, self.data, [API, HEALTH, DASHBOARD], HOOK)
        self.key = KEY
        self.senders: list[Sender] = []
        self._stepped: Stepped | None = None
        self._plain: subprocess.Popen[bytes] | None = None
        self._began = 0

    def with_bot(self) -> None:
        self.env |= {
            "TELEGRAM_BOT_TOKEN": "1:kills", "TELEGRAM_CHAT_ID": str(CHAT),
            "VPN_SENTINEL_TELEGRAM_API_URL": f"http://127.0.0.1:{BOT}",
        }  # fmt: skip

    # The server that is killed.

    def begin(self, *words: str) -> None:
        """Start the server, or another command."""
        self._stepped = Stepped([*PROGRAM, *(words or ("server",))], self.env, self.out, self.log)

    def arm(self) -> None:
        """From here on steps count."""
        assert self._stepped is not None
        self._began = len(self._stepped.steps)
        if self.at is not None:
            self._stepped.kill_at(self.at)

    def stop(self) -> None:
        assert self._stepped is not None
        self._stepped.process.terminate()

    @property
    def ended(self) -> bool:
        assert self._stepped is not None
        return self._stepped.process.poll() is not None

    def until_killed(self, done: Callable[[], bool]) -> None:
        """Wait for the kill: until `done`, and a little longer where a step is to be reached that did not come yet."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end and not self.ended:
            if _is(done):
                end = min(end, time.monotonic() + (0.0 if self.at is None else LATE))
            time.sleep(0.01)
        assert self._stepped is not None
        by_itself = self._stepped.process.poll() is not None and not self._stepped.killed
        self._stepped.end()
        self.steps = self._stepped.steps[self._began :]
        if self._stepped.killed:
            self.how, self.last = "at the step", self.steps.pop()
        elif by_itself:
            self.how = "ended before"
            if status := self._stepped.process.returncode:
                self.wrong.append(f"ended with status {status}, and nobody killed it")
        else:
            self.how = "after the last step"

    # The server after it.

    def again(self) -> None:
        """Start it once more. Raises Unstartable."""
        if self.database is None:
            asyncio.run(_end_leases(self.url))
        since, began = self.log.stat().st_size, time.monotonic()
        with self.out.open("ab") as out, self.log.open("ab") as log:
            self._plain = subprocess.Popen([*PROGRAM, "server"], env=self.env, stdout=out, stderr=log)
        if not self.waits_for(lambda: self.healthy("/health/ready"), self._plain):
            said = self.log.read_text()[since:].strip()
            status = self._plain.poll()
            raise Unstartable(f"{'no answer' if status is None else f'status {status}'}: {said[-2000:]}")
        self.times.append(time.monotonic() - began)

    def command(self, *words: str) -> None:
        """Run another command, beside the server or without one. Raises CalledProcessError."""
        subprocess.run([*PROGRAM, *words], env=self.env, capture_output=True, check=True)

    def waits_for(
        self, condition: Callable[[], bool], process: "subprocess.Popen[bytes] | None" = None, limit: float = LIMIT
    ) -> bool:
        """Whether it holds within the limit, while `process` lives."""
        end = time.monotonic() + limit
        while not (holds := _is(condition)) and time.monotonic() < end:
            if process is not None and process.poll() is not None:
                return False
            time.sleep(0.02)
        return holds

    def first(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for what must be so before the kill. Raises TimeoutError."""
        if not self.waits_for(condition):
            raise TimeoutError(what)

    def healthy(self, path: str = "/health") -> bool:
        return ask(HEALTH, path)[0] == 200

    def started(self) -> bool:
        """Whether it answers, and has told that it started."""
        return any(body["kind"] == "server_started" for _, body in self.heard()) and self.healthy()

    def get(self, path: str) -> Any:
        status, said = ask(API, f"/api/v1{path}", self.key)
        if status != 200:
            raise http.client.HTTPException(f"{path}: {status}")
        return json.loads(said)

    def end(self) -> None:
        """End all that runs."""
        for sender in self.senders:
            sender.stop.set()
        if self._stepped is not None:
            self._stepped.end()
        if self._plain is not None:
            self._plain.kill()
            self._plain.wait()

    def look(self) -> None:
        """What came more than once, and whether all that the server wrote is whole. It must have ended."""
        said = Counter(number for number, _ in self.heard()), Counter(m["plain"] for m in self.telegram.messages(CHAT))
        self.twice = sum(times > 1 for counted in said for times in counted.values())
        copies = {one.path for one in backup.backups(self.data / "backups")}
        there = {path for path in self.data.rglob("*") if path.is_file()} - copies
        if odd := {path.name for path in there} - _OURS:
            self.wrong.append(f"left in the data folder: {', '.join(sorted(odd))}")
        for database in copies | {path for path in there if path.suffix == ".db"}:
            with contextlib.closing(sqlite3.connect(database)) as connection:
                if problem := backup.integrity_problem(connection):
                    self.wrong.append(f"{database.name} is damaged: {problem}")
        self.wrong += [f"log: {line}" for line in self.log.read_text().splitlines() if _is_bad(line)]
        if any(body["kind"] == "database_damaged" for _, body in self.heard()):
            self.wrong.append("people were told of damage")

    # Agents, and what people were told.

    def report(self, agent: Sender, seq: int) -> bool:
        """Post one report; whether it was acknowledged."""
        headers = {"X-API-Key": self.key, "Content-Type": "application/json"}
        with contextlib.suppress(OSError, http.client.HTTPException, json.JSONDecodeError):
            status, said = ask(API, "/api/v1/agent", method="POST", body=agent.body(seq), headers=headers)
            if status == 200 and json.loads(said)["ack"] >= seq:
                agent.acked = max(agent.acked, seq)
        return agent.acked >= seq

    def heard(self) -> list[tuple[int, dict[str, Any]]]:
        """Deliveries that the webhook took, and what they say. Of a server that died as it sent one may be cut off."""
        heard = []
        for request in self.webhook.received():
            with contextlib.suppress(json.JSONDecodeError):
                heard.append((int(request["headers"]["x-sentinel-delivery"]), json.loads(request["body"])))
        return heard

    def told(self, kind: str, tunnel: str) -> list[int]:
        """How often each channel told that: the webhook, and the chat where there is a bot."""
        times = [sum(body["kind"] == kind and body["tunnel"] == tunnel for _, body in self.heard())]
        if "TELEGRAM_BOT_TOKEN" in self.env:
            word = {"leaking": "LEAK", "connected": "CONNECT"}[kind]
            chat = (message["plain"].upper() for message in self.telegram.messages(CHAT))
            times.append(sum(word in text and tunnel.upper() in text for text in chat))
        return times

    def must_be_told(self, kind: str, tunnel: str) -> None:
        if not self.waits_for(lambda: all(self.told(kind, tunnel)), limit=TELL):
            self.lost.append(f"{kind} of {tunnel}: told {self.told(kind, tunnel)} times, owed {self.owed(tunnel)}")

    def owed(self, tunnel: str) -> list[dict[str, Any]]:
        """What is not settled of a tunnel."""
        found = self.get(f"/deliveries?tunnel={tunnel}&limit=500")["deliveries"]
        return [row for row in found if row["status"] in ("due", "leased")]

    def must_hold(self, agent: Sender) -> None:
        """All that was acknowledged to it, and what follows from that: each report turns the state, and is told."""
        history = self.get(f"/tunnels/{agent.name}/history?limit=500")
        there = {row["seq"] for row in history["observations"]}
        if missing := set(range(1, agent.acked + 1)) - there:
            self.lost.append(f"{agent.name}: acknowledged up to {agent.acked}, missing {sorted(missing)}")
        moves = [(row["old"], row["new"]) for row in reversed(history["transitions"])]
        if len(moves) != len(there) or any(a[1] != b[0] for a, b in itertools.pairwise(moves)):
            self.lost.append(f"{agent.name}: {len(there)} reports, and moved {moves}")
        if not self.waits_for(lambda: not self.owed(agent.name), limit=TELL):
            self.lost.append(f"{agent.name}: still owed {self.owed(agent.name)}")
        rows = self.get(f"/deliveries?tunnel={agent.name}&limit=500")["deliveries"]
        heard = [number for number, _ in self.heard()]
        for row in rows:
            if row["channel"] == "webhook" and row["status"] == "done" and row["id"] not in heard:
                self.lost.append(f"{agent.name}: delivery {row['id']} ({row['kind']}) never came")
        if len({row["channel"] for row in rows}) * len(moves) != len(rows):
            self.lost.append(f"{agent.name}: {len(moves)} moves, {len(rows)} deliveries")


def ask(
    port: int, path: str, key: str = "", *, method: str = "GET", body: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes]:  # fmt: skip
    """Status and body. Raises OSError and HTTPException."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path, body, headers or ({"X-API-Key": key} if key else {}))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _is(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except (OSError, http.client.HTTPException):
        return False


def _is_bad(line: str) -> bool:
    return line.startswith("Traceback") or line[20:].startswith(" ERROR") or line[21:].startswith("ERROR")


async def _end_leases(url: str) -> None:
    """As if the minute had passed that a killed server's leases stand where others may deliver too."""
    connection = await asyncpg.connect(url)
    try:
        with contextlib.suppress(asyncpg.UndefinedTableError):
            await connection.execute("UPDATE outbox SET leased_until = 0 WHERE settled_at IS NULL")
    finally:
        await connection.close()


def median_and_worst(times: list[float]) -> str:
    return f"{statistics.median(times):.1f} / {max(times):.1f}" if times else "–"
