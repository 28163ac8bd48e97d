"""uvicorn inside our own loop: several ports, one process, an end within a second."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from vpn_sentinel.runtime.settings import SettingError


class EmbeddedServer(uvicorn.Server):
    """A server that leaves the signals to whoever runs the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def embedded(app: Any, *, cert: Path | None = None, key: Path | None = None) -> EmbeddedServer:
    """A server for `app`, to be run with `serve(sockets=[…])`."""
    config = uvicorn.Config(
        app,
        loop="none",
        http="httptools",
        ws="websockets-sansio",
        ws_per_message_deflate=False,  # costs 32 KB a connection, and reports are small
        ws_max_size=512 * 1024,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # ours are believed only from listed networks
        timeout_graceful_shutdown=1,
        backlog=2048,
        ssl_certfile=str(cert) if cert else None,
        ssl_keyfile=str(key) if key else None,
    )
    return EmbeddedServer(config)


def listen(host: str, port: int, setting: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Bind a socket; `::` takes IPv4 too. Raises SettingError that names `setting` when it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        if host == "::" and not socket.has_dualstack_ipv6():
            host, family = "0.0.0.0", socket.AF_INET  # noqa: S104 - a machine without IPv6
        bound = socket.socket(family, kind)
        try:
            if kind is socket.SOCK_STREAM:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
            bound.setblocking(False)
            bound.bind((host, port))
        except BaseException:
            bound.close()
            raise
    except OSError as e:
        name = "udp" if kind is socket.SOCK_DGRAM else "tcp"
        raise SettingError(setting, f"cannot listen on {host} port {port}/{name}: {e.strerror}") from e
    return bound


async def serve_until(server: EmbeddedServer, bound: socket.socket, closing: asyncio.Event) -> None:
    """Serve `bound` until `closing` is set; the streams of `server` watch the same event."""
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(sockets=[bound]))
        await closing.wait()
        server.should_exit = True
        await serving
