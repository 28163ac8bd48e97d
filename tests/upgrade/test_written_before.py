"""A database and a spool that an earlier build wrote are read by this one, with all that is in them.

`written/` was made by the build of 2026-11-29 in the lab, on a WireGuard tunnel without a kill switch: twice it was
deleted and leaked; then the server was stopped, the tunnel came back, went down again, and the agent was stopped with
nine observations in its spool (whose boot's number was changed, so that it is another boot on every machine).
`api.json.gz` is what the API of that build answered just before the server's stop.
Nothing in here is made anew when the formats change: that is what the tests are for.
"""

import gzip
import json
import sqlite3
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.integration.program import KEY, Process, Server
from tests.integration.test_durability import free_port, wait_until

WRITTEN = Path(__file__).parent / "written"
TUNNEL = "home"
# The files grow older with each day, and retention and the age of a report must not be what is tested here.
RETENTION = {"VPN_SENTINEL_RETENTION_DAYS": "3650"}
# What goes on by itself once a server runs.
MOVES_ON = {"state", "since", "deadline", "findings", "last_seen"}


def unpack(name: str, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(gzip.decompress((WRITTEN / name).read_bytes()))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    unpack("server.db.gz", tmp_path / "server" / "sentinel.db")
    started = Server(tmp_path / "server", **RETENTION)
    yield started
    started.close()


def history(server: Server) -> dict[str, Any]:
    status, found = server.ask(f"/api/v1/tunnels/{TUNNEL}/history?limit=500")
    assert status == 200, found
    return dict(found)


def test_a_database_of_an_earlier_build_is_shown_as_it_was(server: Server) -> None:
    before = json.loads(gzip.decompress((WRITTEN / "api.json.gz").read_bytes()))
    status, tunnel = server.ask(f"/api/v1/tunnels/{TUNNEL}")
    assert status == 200
    kept = {key: value for key, value in before["tunnel"].items() if key not in MOVES_ON}
    assert {key: tunnel[key] for key in kept} == kept
    shown = history(server)
    for kind in ("transitions", "observations"):
        assert before["history"][kind], kind
        assert [row for row in shown[kind] if row in before["history"][kind]] == before["history"][kind], kind


def test_a_spool_of_an_earlier_build_is_delivered(server: Server, tmp_path: Path) -> None:
    spool = tmp_path / "agent" / f"agent-{TUNNEL}.sqlite"
    unpack("spool.sqlite.gz", spool)
    with sqlite3.connect(spool) as rows:
        numbers = {seq for (seq,) in rows.execute("SELECT seq FROM observation")}
    rows.close()
    agent = Process(
        "agent",
        tmp_path,
        {
            "VPN_SENTINEL_URL": f"http://127.0.0.1:{server.port}",
            "VPN_SENTINEL_API_KEY": KEY,
            "VPN_SENTINEL_CLIENT_ID": TUNNEL,
            "VPN_SENTINEL_DATA_DIR": str(spool.parent),
            "VPN_SENTINEL_TRACE_URL": "http://127.0.0.1:9",
            "VPN_SENTINEL_HEALTH_PORT": str(free_port()),
        },
    )
    try:

        def arrived() -> bool:
            assert agent.process.poll() is None, agent.said()
            return numbers <= {row["seq"] for row in history(server)["observations"]}

        wait_until(arrived, 60, "what was spooled arrives")
    finally:
        agent.close()
    assert "damaged" not in agent.said(), agent.said()
    # The tunnel came back and went down again while nobody listened, and the history says so. A year from then a
    # silence comes in between, for a report is never dated further back.
    states = [move["new"] for move in reversed(history(server)["transitions"])]
    assert ("protected", "leaking") in pairwise(states[4:]), states
