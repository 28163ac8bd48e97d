import asyncio
import json

import pytest

from tests.conftest import ManualClock
from vpn_sentinel.agent.health import Health, Signs
from vpn_sentinel.runtime.settings import SettingError

NOW = 1_800_000_000.0


def health(clock: ManualClock, last_round: float | None, last_ack: float | None, started: float = 0.0) -> Health:
    def at(ago: float | None) -> float | None:
        return None if ago is None else NOW - ago

    return Health(lambda: Signs(NOW - started, at(last_round), at(last_ack), "protected", 3), clock, 30.0)


CASES = {
    "just started": ((None, None, 5.0), {"/client/health": 200, "/ready": 503, "/startup": 503}),
    "all well": ((10, 10), {"/client/health": 200, "/ready": 200, "/startup": 200, "/client/health/ready": 200}),
    "the server is away for a while": (
        (10, 300),
        {"/client/health": 200, "/ready": 503, "/client/health/startup": 200},
    ),
    "the server is away for long": ((10, 2000), {"/client/health": 503, "/health": 503, "/startup": 200}),
    "rounds have stopped": ((500, 10), {"/client/health": 503, "/ready": 503, "/": 503}),
    "rounds never began": ((None, None, 500.0), {"/client/health": 503, "/startup": 503}),
    "never reported": ((10, None, 2000.0), {"/client/health": 503, "/ready": 503}),
    "something else": ((10, 10), {"/metrics": 404, "/client/healthy": 404}),
}


@pytest.mark.parametrize(("signs", "answers"), CASES.values(), ids=CASES.keys())
def test_health_is_tied_to_the_last_success(clock: ManualClock, signs: tuple, answers: dict[str, int]) -> None:  # type: ignore[type-arg]
    made = health(clock, *signs)
    assert {path: made.answer(path)[0] for path in answers} == answers


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def test_it_speaks_http(clock: ManualClock, free_port: int) -> None:
    server = await health(clock, 10, 20).serve("127.0.0.1", free_port)
    try:
        answer = await ask(free_port, b"GET /client/health?x HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert json.loads(body) == {
            "status": "healthy", "state": "protected", "last_round_seconds_ago": 10.0, "last_report_seconds_ago": 20.0,
            "waiting_reports": 3,
        }  # fmt: skip
        assert (await ask(free_port, b"HEAD /ready HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")
        assert (await ask(free_port, b"POST /ready HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405")
        assert await ask(free_port, b"GET /" + b"x" * 9000) == b""
    finally:
        server.close()
        await server.wait_closed()


async def test_a_busy_port_is_named(clock: ManualClock, free_port: int) -> None:
    first = await health(clock, 1, 1).serve("127.0.0.1", free_port)
    try:
        with pytest.raises(SettingError, match=rf"HEALTH_PORT: cannot listen on 127\.0\.0\.1 port {free_port}"):
            await health(clock, 1, 1).serve("127.0.0.1", free_port)
    finally:
        first.close()
        await first.wait_closed()
