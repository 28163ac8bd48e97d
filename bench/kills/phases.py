"""What the server does while it is killed, and what must be true after its next start."""

import asyncio
import contextlib
import http.client
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from alembic.script import ScriptDirectory
from sqlalchemy import Executable, text

import vpn_sentinel.server.store as store_package
from bench.kills.stand import API, Stand
from tests.integration.test_durability import Sender
from tests.upgrade.test_migrations import older_schema
from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.wire.codec import encode

AGENTS, REPORTS = 3, 3
_ALEMBIC: Final = threading.Lock()  # its context is one for the whole process
_KEY: Final = re.compile(r"\bvs_\S+")


def first_start(stand: Stand) -> None:
    """On nothing, without a key: the first key that was shown last is the one that is taken."""
    del stand.env["VPN_SENTINEL_API_KEY"]
    stand.begin()
    stand.arm()
    stand.until_killed(stand.started)
    stand.again()
    shown = _KEY.findall(stand.out.read_text())
    stand.key = shown[-1] if shown else ""
    try:
        stand.get("/tunnels")
    except http.client.HTTPException as e:
        stand.lost.append(f"{len(shown)} first keys were shown, and the last is not taken: {e}")


def upgrade(revision: str, stand: Stand) -> None:
    """Of a database with a tunnel, its reports, and a leak that is owed."""
    _make(stand.url, revision)
    if stand.database is not None:
        with contextlib.closing(sqlite3.connect(stand.database)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # as a server has it
    stand.begin()
    stand.arm()
    stand.until_killed(stand.started)
    stand.again()
    _must_hold_past(stand)
    stand.must_be_told("leaking", "nl")


def _make(url: str, revision: str) -> None:
    with _ALEMBIC:
        asyncio.run(older_schema(url, revision, _past()))


def _must_hold_past(stand: Stand) -> None:
    history = stand.get("/tunnels/nl/history?limit=500")
    seqs = sorted(row["seq"] for row in history["observations"])
    if (seqs, len(history["transitions"]), stand.get("/tunnels/nl")["name"]) != ([1, 2, 3], 2, "nl"):
        stand.lost.append(f"of three reports {seqs}, of two transitions {len(history['transitions'])}")
    if len(stand.get("/incidents?tunnel=nl")["incidents"]) != 1:
        stand.lost.append("the incident")


def _past() -> list[Executable]:
    now = time.time()
    owed = encode(Notice(kind=Kind.LEAKING, tunnel="nl", at=now)).decode()
    reports = [
        text(
            "INSERT INTO observations (tunnel_id, spool, seq, at, received_at, state, body)"
            " SELECT id, 's1', :seq, :at, :at, 'protected', '{}' FROM tunnels"
        ).bindparams(seq=seq, at=now - 100 + seq)
        for seq in (1, 2, 3)
    ]
    return [
        *reports,
        text("UPDATE transitions SET at = :at, decided_at = :at").bindparams(at=now - 90),
        text(
            'INSERT INTO transitions (tunnel_id, at, decided_at, "old", "new", findings)'
            " SELECT id, :at, :at, 'down', 'leaking', '[]' FROM tunnels"
        ).bindparams(at=now - 80),
        text(
            "INSERT INTO incidents (tunnel_id, opened_at, worst, findings) SELECT id, :at, 'leaking', '[]' FROM tunnels"
        ).bindparams(at=now - 90),
        text(
            "INSERT INTO outbox (channel, tunnel, kind, body, created_at, due_at, leased_until, attempt)"
            " VALUES ('webhook', 'nl', 'leaking', :body, :at, :at, 0, 0)"
        ).bindparams(body=owed, at=now),
    ]


def commit(stand: Stand) -> None:
    """While agents report, each report turns the state, and each turn is told."""
    stand.begin()
    stand.first(stand.healthy, "a start")
    stand.arm()
    _agents(stand)
    stand.until_killed(lambda: all(s.acked >= REPORTS for s in stand.senders))
    stand.again()
    _held(stand)


def delivery(stand: Stand) -> None:
    """From a leak's report until the webhook and the chat were told and that is noted."""
    stand.with_bot()
    stand.begin()
    agent = Sender("nl", API)
    stand.first(stand.healthy, "a start")
    stand.first(lambda: stand.report(agent, 1), "a report")
    stand.first(lambda: all(stand.told("connected", "nl")) and not stand.owed("nl"), "all to be told")
    stand.arm()
    stand.report(agent, 2)
    told_at = []

    def told() -> bool:
        if all(stand.told("leaking", "nl")):
            told_at.append(time.monotonic())
        return bool(told_at) and time.monotonic() > told_at[0] + 0.3  # for the note of it

    stand.until_killed(told)
    stand.again()
    if not stand.waits_for(lambda: stand.report(agent, 2)):
        stand.lost.append("the leak's report is not taken any more")
    stand.must_be_told("leaking", "nl")
    stand.must_hold(agent)


def shutdown(stand: Stand) -> None:
    """From SIGTERM to the end, while agents report and somebody reads the stream of events."""
    stand.begin()
    stand.first(stand.healthy, "a start")
    _agents(stand)
    stand.first(lambda: all(s.acked for s in stand.senders), "reports")
    stream = http.client.HTTPConnection("127.0.0.1", API, timeout=5)
    stream.request("GET", "/api/v1/events", headers={"X-API-Key": stand.key})
    stand.arm()
    stand.stop()
    stand.until_killed(lambda: stand.ended)
    stream.close()
    stand.again()
    _held(stand)


def backup(stand: Stand) -> None:
    """By the command; the next one, beside a server, clears up what it left."""
    _make(stand.url, "head")
    stand.begin("db", "backup")
    stand.arm()
    stand.until_killed(lambda: stand.ended)
    stand.again()
    _must_hold_past(stand)
    stand.command("db", "backup")
    if not any(stand.data.glob("backups/sentinel-*.db")):
        stand.lost.append("no backup was made")


def _agents(stand: Stand) -> None:
    stand.senders = [Sender(f"tunnel-{number}", API) for number in range(AGENTS)]
    for sender in stand.senders:
        sender.start()


def _held(stand: Stand) -> None:
    """Agents go on with the new server; then all that was acknowledged before and after is there."""
    before = [sender.acked for sender in stand.senders]
    if not stand.waits_for(lambda: all(s.acked > b for s, b in zip(stand.senders, before, strict=True))):
        stand.lost.append("agents cannot go on")
    for sender in stand.senders:
        sender.stop.set()
    for sender in stand.senders:
        sender.join()
    for sender in stand.senders:
        stand.must_hold(sender)


def _older() -> list[str]:
    """Each schema but today's, the oldest first."""
    script = ScriptDirectory(str(Path(store_package.__file__).parent / "migrations"))
    return sorted(r.revision for r in script.walk_revisions() if r.revision != script.get_current_head())


Work = Callable[[Stand], None]
# By phase, each of its cases by name.
PHASES: Final[dict[str, dict[str, Work]]] = {
    "start": {"first start": first_start},
    "upgrade": {f"upgrade from {revision}": partial(upgrade, revision) for revision in _older()},
    "commit": {"commit": commit},
    "delivery": {"delivery": delivery},
    "shutdown": {"shutdown": shutdown},
    "backup": {"backup": backup},
}
# PostgreSQL's are not ours to make.
ON_SQLITE: Final = frozenset({"backup"})
