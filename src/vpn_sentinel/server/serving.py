"""Runs uvicorn in our own event loop: several ports in one process, limits for clients, shutdown within a second."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any, Final

import uvicorn

from vpn_sentinel.runtime.settings import SettingError
from vpn_sentinel.server.acceptor import Acceptor
from vpn_sentinel.server.connection import HttpConnection, Limits
from vpn_sentinel.server.connection_limit import ConnectionLimit, ConnectionSlot, connections_for
from vpn_sentinel.server.request_normalizer import RequestNormalizer

# The last one: a link-local address without its zone (ipv6(7)).
_NO_SUCH_ADDRESS: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)
_CONNECTION: Final = "vpn_sentinel.connection"  # its key in ASGI's `state`
LISTEN_BACKLOG: Final = 2048  # connections that the kernel queues until they are accepted
_CONNECTIONS_END_WITHIN_S: Final = 0.5
_TASKS_END_WITHIN_S: Final = 0.2


class EmbeddedServer(uvicorn.Server):
    """A server that leaves the signals to its caller, and the connections to `Acceptor`.

    Only this class depends on uvicorn's internals: `serve` calls `startup` with the sockets and closes `servers` at the
    end; a protocol is made from `config`, `server_state` and `app_state`, passes a copy of the last on as ASGI's
    `state`, and puts a WebSocket's protocol in its own place by the transport's `set_protocol`.
    """

    def __init__(self, config: uvicorn.Config, limits: Limits, tracking_app: "_TrackingApp") -> None:
        super().__init__(config)
        self.connection_limit = ConnectionLimit(limits.connections, limits.per_address, max(limits.connections // 2, 1))
        self._limits, self._app = limits, tracking_app
        self._connections: set[HttpConnection] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        self.servers = []
        for bound in sockets or []:
            taking: Any = Acceptor(
                bound, self.connection_limit, self.protocol,
                backlog=self.config.backlog, context=self.config.ssl, tls_timeout_s=self._limits.head_within,
            )  # fmt: skip
            self.servers.append(taking)
        self.started = True

    def abort(self) -> None:
        """End every connection now, even with unsent data."""
        for connection in list(self._connections):
            connection.abort()

    def cancel(self) -> None:
        """End every request whose connection is gone."""
        for task in list(self._app.running):
            task.cancel()

    def protocol(self, slot: ConnectionSlot) -> HttpConnection:
        """The protocol for the connection of `slot`."""
        return HttpConnection(
            self.connection_limit, self._limits, slot,
            server=self._make_server, websockets=self.config.ws_protocol_class is not None,
            connections=self._connections,
        )  # fmt: skip

    def _make_server(self, connection: HttpConnection) -> asyncio.Protocol:
        made: Any = self.config.http_protocol_class
        state = {**self.lifespan.state, _CONNECTION: connection}
        protocol: asyncio.Protocol = made(config=self.config, server_state=self.server_state, app_state=state)
        return protocol


class _TrackingApp:
    """Calls the application through the request's connection, and keeps track of the running calls."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.running: set[Any] = set()  # asyncio.Task

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        connection: HttpConnection = scope["state"].pop(_CONNECTION)
        task = asyncio.current_task()
        self.running.add(task)
        try:
            serve = connection.serve_http if scope["type"] == "http" else connection.serve_websocket
            await serve(self._app, scope, receive, send)
        finally:
            self.running.discard(task)


def embedded(
    app: Any, *, cert: Path | None = None, key: Path | None = None, side: bool = False, limits: Limits | None = None
) -> EmbeddedServer:
    """A server for `app`, to be run with `serve(sockets=[…])`.

    With `side`, for a secondary port, it accepts no WebSockets, and gets two sixteenths of the process's descriptors;
    the main one gets eleven.
    """
    if limits is None:
        limits = Limits(connections=connections_for(2 if side else 11))
    tracking_app = _TrackingApp(RequestNormalizer(app))
    config = uvicorn.Config(
        tracking_app,
        loop="none",
        http="httptools",
        ws="none" if side else "websockets-sansio",
        ws_per_message_deflate=False,  # costs 32 KB a connection, and reports are small
        ws_max_size=512 * 1024,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # we use them only from trusted networks
        timeout_graceful_shutdown=1,
        timeout_keep_alive=ceil(limits.idle + limits.head_within) + 1,  # `HttpConnection` ends it earlier
        backlog=LISTEN_BACKLOG,
        ssl_certfile=str(cert) if cert else None,
        ssl_keyfile=str(key) if key else None,
    )
    return EmbeddedServer(config, limits, tracking_app)


def listen(
    host: str, port: int, setting: str, kind: socket.SocketKind = socket.SOCK_STREAM, *, host_setting: str = ""
) -> socket.socket:
    """Bind a socket; `::` includes IPv4, and means only IPv4 on a machine without IPv6.

    Raises SettingError: it names `host_setting` where the address is the cause, else `setting`, the port's.
    """
    try:
        try:
            return _bound(host, port, kind)
        except OSError as e:
            if host != "::" or e.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
        return _bound("0.0.0.0", port, kind)  # noqa: S104 - the same, without IPv6
    except OSError as e:
        if host_setting and (isinstance(e, socket.gaierror) or e.errno in _NO_SUCH_ADDRESS):
            raise SettingError(host_setting, f"cannot listen on {host}: {e.strerror}") from e
        name = "udp" if kind is socket.SOCK_DGRAM else "tcp"
        raise SettingError(setting, f"cannot listen on {host} port {port}/{name}: {e.strerror}") from e


def _bound(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    """Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
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
    return bound


async def serve_until(server: EmbeddedServer, bound: socket.socket, closing: asyncio.Event) -> None:
    """Serve `bound` until `closing` is set; the streams of `server` watch the same event.

    What has not ended half a second later is aborted, so that a stalled client does not delay the end.
    """
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(sockets=[bound]))
        await closing.wait()
        server.should_exit = True
        for timeout_s, cut in ((_CONNECTIONS_END_WITHIN_S, server.abort), (_TASKS_END_WITHIN_S, server.cancel)):
            done, _ = await asyncio.wait({serving}, timeout=timeout_s)
            if not done:
                cut()
        await serving
        server.abort()  # connections that still send their close
