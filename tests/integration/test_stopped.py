"""A server that is stopped for a while (SIGSTOP, a paused machine) takes its own absence for nobody's silence."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.integration.test_durability import KEY, Sender, free_port, server_answers, settings, wait_until
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import transitions, tunnels
from vpn_sentinel.server.watch.overdue import RETURN_GRACE_S

STOPPED = 8.0


def report(port: int, name: str) -> None:
    """One report of an agent that reports each second, so it is silent after four."""
    said: dict[str, Any] = json.loads(Sender(name, port).body(1))
    said["hello"]["interval"] = 1
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(
        "POST", "/api/v1/agent", json.dumps(said), {"X-API-Key": KEY, "Content-Type": "application/json"}
    )
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.slow
async def test_a_server_that_was_stopped_calls_nobody_silent(database_url: str, tmp_path: Path) -> None:
    ports = [free_port() for _ in range(3)]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "vpn_sentinel", "server"],
            env={**os.environ, **settings(database_url, tmp_path, ports, free_port())},
            stdout=out,
            stderr=out,
        )
    try:
        wait_until(lambda: server_answers(ports[0]), 30, "the server starts")
        report(ports[0], "nl")
        process.send_signal(signal.SIGSTOP)
        time.sleep(STOPPED)  # noqa: ASYNC251
        process.send_signal(signal.SIGCONT)
        back = time.time()
        wait_until(lambda: b"no reports could be received" in log.read_bytes(), 10, "the absence is noticed")
        time.sleep(3)  # noqa: ASYNC251
        store = await open_store(database_url)
        moves = [r.new for r in await store.read(select(transitions.c.new))]
        (deadline,) = [r.deadline for r in await store.read(select(tunnels.c.deadline))]
        await store.close()
    finally:
        process.kill()
        process.wait()
    assert moves == ["protected"]
    assert deadline >= back + RETURN_GRACE_S - 1
    said = log.read_text(encoding="utf-8")
    assert "this server was stopped, or its machine slept" in said
