import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import pytest

from tests.conftest import ManualClock, needs_files, until
from vpn_sentinel.agent.health import MAX_CONNECTIONS, REQUEST_TIMEOUT_S, ROUTES, Health, HealthFacts
from vpn_sentinel.runtime.settings import SettingError

NOW = 1_800_000_000.0


def health(clock: ManualClock, last_round: float | None, last_ack: float | None, started: float = 0.0) -> Health:
    def at(ago: float | None) -> float | None:
        return None if ago is None else NOW - ago

    return Health(lambda: HealthFacts(NOW - started, at(last_round), at(last_ack), "protected", 3), clock, 30.0)


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


@needs_files(500)
async def test_hundreds_that_come_at_once_shut_nobody_out(clock: ManualClock, free_port: int) -> None:
    """While the agent is at something else: the kernel takes them, or they would try again after a second."""
    server = await health(clock, 10, 20).serve("127.0.0.1", free_port)
    with contextlib.ExitStack() as open_:
        made = [
            open_.enter_context(socket.create_connection(("127.0.0.1", free_port), timeout=0.5)) for _ in range(200)
        ]
        asking = made[100]
        asking.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        asking.setblocking(False)
        async with asyncio.timeout(5):
            assert (await asyncio.get_running_loop().sock_recv(asking, 100)).startswith(b"HTTP/1.1 200")
    server.close()
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_it_speaks_http(clock: ManualClock, free_port: int) -> None:
    server = await health(clock, 10, 20).serve("127.0.0.1", free_port)
    try:
        answer = await ask(free_port, b"GET /client/health?x HTTP/1.1\r\nHost: localhost:8082\r\n\r\n")
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


# Nothing here asks for a key, and none is looked at. What a key says is no column, therefore.
WRITES = dict.fromkeys(("POST", "PUT", "PATCH", "DELETE", "TRACE"), 405)
WELL = {"GET": 200, "HEAD": 200, "OPTIONS": 204, **WRITES}
TABLE = {
    "/": WELL,
    "/health": WELL,
    "/ready": WELL,
    "/startup": WELL,
    "/client/health": WELL,
    "/client/health/ready": WELL,
    "/client/health/startup": WELL,
}
NOWHERE = ("//", "//health", "/health//", "/client", "/client//health", "/client/health/health", "/metrics", "/ready/x")


@pytest.fixture
async def port(clock: ManualClock, free_port: int) -> AsyncIterator[int]:
    server = await health(clock, 10, 20).serve("127.0.0.1", free_port)
    yield free_port
    server.close()
    await server.wait_closed()


async def test_every_route_by_every_method(port: int) -> None:
    assert set(TABLE) == set(ROUTES)
    wrong = {}
    for path, row in [*TABLE.items(), *((path, dict.fromkeys(WELL, 404)) for path in NOWHERE)]:
        for method, status in row.items():
            for written in {path, path if path in NOWHERE else path.rstrip("/") + "/"}:
                for key in ("", "X-API-Key: anything\r\n"):
                    head, _, body = (await ask(port, f"{method} {written} HTTP/1.1\r\n{key}\r\n".encode())).partition(
                        b"\r\n\r\n"
                    )
                    found = int(head[9:12])
                    empty = method == "HEAD" or found == 204
                    allow = b"\r\nAllow: GET, HEAD, OPTIONS" in head
                    if (found, empty, allow) != (status, body == b"", status in (204, 405)):
                        wrong[method, written, key] = found
    assert wrong == {}


@pytest.mark.parametrize(
    ("host", "status"),
    {
        "": 200,
        "Host: localhost:8082\r\n": 200,
        "Host: 127.0.0.1:8082\r\n": 200,
        "host: [::1]\r\n": 200,
        "Host: rebound.example\r\n": 421,
        "Host: localhost.rebound.example:8082\r\n": 421,
        "Host: localhost\r\nHost: rebound.example\r\n": 421,
        "Host: 127.0.0.1.rebound.example\r\n": 421,
        "Host:\r\n": 421,
    }.items(),
)
async def test_on_loopback_it_answers_to_no_other_sites_name(port: int, host: str, status: int) -> None:
    answer = await ask(port, f"GET /client/health HTTP/1.1\r\n{host}\r\n".encode())
    assert int(answer[9:12]) == status
    assert (b"protected" in answer) == (status == 200)
    assert b"access-control" not in answer.lower()
    assert b"\r\nCross-Origin-Resource-Policy: same-origin\r\n" in answer


async def test_where_the_owner_opened_it_every_name_will_do(clock: ManualClock, free_port: int) -> None:
    server = await health(clock, 10, 20).serve("0.0.0.0", free_port)
    try:
        assert (await ask(free_port, b"GET / HTTP/1.1\r\nHost: gluetun:8082\r\n\r\n"))[9:12] == b"200"
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    "line", ["", "GET", "GET /", "GET  HTTP/1.1", "/ HTTP/1.1", "GET http://x/ HTTP/1.1", "GET / SSH"]
)
async def test_what_is_no_request_is_told_so(port: int, line: str) -> None:
    assert (await ask(port, f"{line}\r\n\r\n".encode())).startswith(b"HTTP/1.1 400 ")


async def test_who_holds_all_places_keeps_nobody_out(port: int) -> None:
    held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3 * MAX_CONNECTIONS)]
    try:
        assert (await ask(port, b"GET / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        async with asyncio.timeout(REQUEST_TIMEOUT_S / 2):  # the first yielded long before their time was over
            with contextlib.suppress(ConnectionError):
                assert (
                    await asyncio.gather(*(reader.read() for reader, _ in held[:MAX_CONNECTIONS]))
                    == [b""] * MAX_CONNECTIONS
                )
    finally:
        for _, writer in held:
            writer.transport.abort()


async def test_a_busy_port_is_named(clock: ManualClock, free_port: int) -> None:
    first = await health(clock, 1, 1).serve("127.0.0.1", free_port)
    try:
        with pytest.raises(SettingError, match=rf"HEALTH_PORT: cannot listen on 127\.0\.0\.1 port {free_port}"):
            await health(clock, 1, 1).serve("127.0.0.1", free_port)
    finally:
        first.close()
        await first.wait_closed()
