"""The little that is known of uvicorn's own ways, see `EmbeddedServer`: what fails here has changed there."""

import asyncio
import socket
from typing import Any

import pytest
import uvicorn

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Line(asyncio.Transport):
    """A transport with nobody at its other end."""

    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.1", 4000), "sockname": ("192.0.2.2", 5000)})
        self.protocols: list[Any] = []
        self.written = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocols.append(protocol)


class App:
    def __init__(self) -> None:
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.parametrize(("sent", "kind"), [(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "http"), (HANDSHAKE, "websocket")])
async def test_a_protocol_is_made_of_three_and_hands_the_state_on(sent: bytes, kind: str) -> None:
    app, line, mine = App(), Line(), object()
    config = uvicorn.Config(app, http="httptools", ws="websockets-sansio", log_config=None, lifespan="off")
    config.load()
    made: Any = config.http_protocol_class
    state = uvicorn.Server(config).server_state
    protocol = made(config=config, server_state=state, app_state={"mine": mine})
    protocol.connection_made(line)
    protocol.data_received(sent)
    assert [type(p) is config.ws_protocol_class for p in line.protocols] == [True] * (kind == "websocket")
    tasks = list(state.tasks)
    await asyncio.wait(tasks)
    assert [scope["type"] for scope in app.scopes] == [kind]
    assert app.scopes[0]["state"]["mine"] is mine
    app.scopes[0]["state"].pop("mine")  # a copy: the next request has it too
    assert protocol.app_state["mine"] is mine
    for each in [protocol, *line.protocols]:
        each.connection_lost(None if each not in line.protocols[:1] else ConnectionAbortedError())


async def test_a_server_starts_with_sockets_and_closes_its_servers() -> None:
    said: list[str] = []

    class Taking:
        def close(self) -> None:
            said.append("closed")

        async def wait_closed(self) -> None:
            said.append("waited for")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            said.append(f"{len(sockets or [])} socket")
            await self.lifespan.startup()
            assert self.lifespan.state == {}
            taking: Any = Taking()
            self.servers = [taking]
            self.started = self.should_exit = True

    with socket.create_server(("127.0.0.1", 0)) as bound:
        await Server(uvicorn.Config(App(), loop="none", log_config=None, lifespan="off")).serve(sockets=[bound])
    assert said == ["1 socket", "closed", "waited for"]
