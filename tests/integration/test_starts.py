"""The real server, killed at any moment of its start, and started twice on one database."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_durability import Sender, Server, Sink, free_port, server_answers, settings, wait_until

PROGRAM = [sys.executable, "-m", "vpn_sentinel"]
START = 1.5  # seconds, longer than a start takes


def a_server(url: str, folder: Path) -> Server:
    ports = [free_port() for _ in range(3)]
    return Server(settings(url, folder, ports, free_port()), ports[0])


@pytest.fixture
def server(database_url: str, tmp_path: Path) -> Iterator[Server]:
    made = a_server(database_url, tmp_path)
    yield made
    if made.process is not None:
        made.kill()


def command(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *words], env={**os.environ, **server.settings}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_start_that_is_killed_is_followed_by_one_that_works(server: Server, database_url: str) -> None:
    path = Path(database_url.removeprefix("sqlite:///")) if database_url.startswith("sqlite") else None
    rng = random.Random()
    for _ in range(12):
        if path is not None:
            for file in path.parent.glob("sentinel.db*"):
                file.unlink()
        server.start()
        if path is not None:
            wait_until(path.exists, 30, "the database is made")
            time.sleep(rng.uniform(0.0, 0.2))
        else:
            time.sleep(rng.uniform(START / 3, START))
        server.kill()
        looked = command(server, "db", "check")
        assert (looked.returncode, looked.stderr) == (0, "")
    server.start()
    server.wait()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_second_server_on_one_file_says_so_and_ends(server: Server, database_url: str, tmp_path: Path) -> None:
    server.start()
    server.wait()
    second = command(a_server(database_url, tmp_path), "server")
    said = "is in use by another server: two cannot share a file (several may share a PostgreSQL)\n"
    assert (second.returncode, second.stderr) == (1, f"vpn-sentinel: database {tmp_path}/sentinel.db {said}")
    for words in (("token", "create", "beside"), ("token", "list"), ("tunnel", "list"), ("db", "check")):
        assert command(server, *words).returncode == 0, words
    assert server_answers(server.port)
    server.kill()
    server.start()  # the lock of a server that was killed is gone with it
    server.wait()


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_two_servers_on_one_postgres_both_run(server: Server, database_url: str, tmp_path: Path) -> None:
    second = a_server(database_url, tmp_path)
    server.start()
    second.start()
    try:
        server.wait()
        second.wait()
    finally:
        second.kill()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_people_hear_what_a_damaged_log_lost(database_url: str, tmp_path: Path) -> None:
    """Ten tunnels report, the server is killed, its log rots: fewer are left, and nobody has to find that out."""
    sink = Sink()
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    ports = [free_port() for _ in range(3)]
    server = Server(settings(database_url, tmp_path, ports, sink.server_port), ports[0])
    server.start()
    server.wait()
    senders = [Sender(f"tunnel-{i}", ports[0]) for i in range(10)]
    for sender in senders:
        sender.start()
    wait_until(lambda: all(s.acked for s in senders), 30, "all have reported")
    server.kill()
    for sender in senders:
        sender.stop.set()
    log = tmp_path / "sentinel.db-wal"
    rotten = bytearray(log.read_bytes())
    rotten[len(rotten) // 3] ^= 0xFF
    log.write_bytes(rotten)
    server.start()
    try:
        wait_until(lambda: sink.kinds["database_damaged"], 30, "people are told")
    finally:
        server.kill()
        sink.shutdown()
        sink.server_close()
    assert any(d.startswith("the database's log was damaged: ") for d in sink.details)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_killed_server_is_followed_by_one_that_says_nothing_of_damage(
    server: Server, database_url: str, tmp_path: Path
) -> None:
    sender = Sender("nl", server.port)
    server.start()
    server.wait()
    sender.start()
    for _ in range(3):
        before = sender.acked
        wait_until(lambda b=before: sender.acked > b + 2, 30, "reports are taken")
        server.kill()
        looked = command(server, "db", "check")
        assert (looked.returncode, looked.stderr) == (0, "")
        server.start()
    sender.stop.set()
