"""The least that uvicorn can do: read a body, answer a constant."""

import asyncio
import socket
import sys
from typing import Any

import uvloop

from vpn_sentinel.server.serving import embedded

ANSWER = b'{"status":"ok","message":"Keepalive received","server_time":"2026-01-01T00:00:00+00:00"}'
HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]


async def app(_scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(embedded(app).serve(sockets=[socket.create_server(("127.0.0.1", int(sys.argv[1])))]))
