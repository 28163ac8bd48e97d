"""What all web stand-ins share: requests and replies, failing on command, and HTTP(S) listeners."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True)
class Request:
    """One HTTP request, read to its end."""

    method: str
    host: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    client: str
    tls: bool
    gone: Callable[[], bool] = field(repr=False)
    """Whether the client has hung up: a long poll of a killed client must not linger."""

    def parameters(self) -> dict[str, Any]:
        """Query, form and JSON body together, as the Bot API takes them."""
        found: dict[str, Any] = dict(self.query)
        if self.body:
            if "json" in self.headers.get("content-type", ""):
                found |= json.loads(self.body)
            else:
                found |= dict(parse_qsl(self.body.decode(errors="replace")))
        return found


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; a dict or list becomes JSON."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "application/json"

    def encoded(self) -> bytes:
        match self.body:
            case bytes():
                return self.body
            case str():
                return self.body.encode()
            case other:
                return json.dumps(other).encode()


@dataclass
class _Failure:
    kind: int | str
    times: int | None
    options: dict[str, Any]


class Service:
    """A stand-in. Public methods are what a test may call through the control socket."""

    def __init__(self) -> None:
        self._failure: _Failure | None = None
        self._requests: list[dict[str, Any]] = []
        self._changed = threading.Condition()

    def fail(self, kind: int | str, times: int | None = None, **options: Any) -> None:
        """Fail with an HTTP status, "garbage", "timeout" or "reset"; for ever, or a number of times."""
        with self._changed:
            self._failure = _Failure(kind, times, options)
            self._changed.notify_all()

    def heal(self) -> None:
        """Work again."""
        with self._changed:
            self._failure = None
            self._changed.notify_all()

    def requests(self) -> list[dict[str, Any]]:
        """Every request so far: time, client, method, path, host."""
        return list(self._requests)

    def forget(self) -> None:
        """Drop what was recorded."""
        self._requests.clear()

    def respond(self, request: Request) -> Reply | None:
        """Answer one request; None closes the connection without an answer."""
        row = {"time": time.time(), "client": request.client, "method": request.method, "path": request.path}
        self._requests.append(row | {"host": request.host})
        failure = self._take_failure(request)
        if failure is None:
            return self.answer(request)
        match failure.kind:
            case int(status):
                return self.failed(status, failure.options)
            case "garbage":
                return Reply(200, b'<html><body>{"ip": Down for maintenance\xff\xfe', kind="text/html")
            case "timeout":
                self._hang(request, failure)
                return None
            case _:
                return None

    def answer(self, request: Request) -> Reply:
        raise NotImplementedError

    def failed(self, status: int, options: dict[str, Any]) -> Reply:
        """The body that goes with a failing status."""
        headers = {"Retry-After": str(options["retry_after"])} if "retry_after" in options else {}
        return Reply(status, {"error": {"title": "failing on command", "status": status}}, headers)

    def _take_failure(self, request: Request) -> _Failure | None:
        with self._changed:
            failure = self._failure
            if failure is None or failure.options.get("only", "") not in request.path:
                return None
            if failure.times is not None:
                failure.times -= 1
                if failure.times <= 0:
                    self._failure = None
            return failure

    def _hang(self, request: Request, failure: _Failure) -> None:
        end = time.monotonic() + 300
        with self._changed:
            while time.monotonic() < end and not request.gone():
                if failure.times is None and self._failure is not failure:
                    return
                self._changed.wait(0.1)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lab", ""
    timeout = 330
    service: Service
    tls: bool

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        url = urlsplit(self.path)
        request = Request(
            method=self.command,
            host=self.headers.get("Host", ""),
            path=url.path,
            query=dict(parse_qsl(url.query)),
            headers={key.lower(): value for key, value in self.headers.items()},
            body=body,
            client=bare(self.client_address[0]),
            tls=self.tls,
            gone=self._gone,
        )
        reply = self.service.respond(request)
        if reply is None:
            self.close_connection = True
            return
        content = reply.encoded()
        self.send_response(reply.status)
        for key, value in {"Content-Type": reply.kind, **reply.headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_PATCH = _handle  # noqa: N815

    def _gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        if not readable:
            return False
        if isinstance(self.connection, ssl.SSLSocket):
            return True  # a client that waits for an answer has nothing to say but goodbye
        with contextlib.suppress(OSError):
            return not self.connection.recv(1, socket.MSG_PEEK)
        return True

    def log_message(self, *_: Any) -> None:
        """Requests are recorded by the service."""


class Listener(ThreadingHTTPServer):
    """One address and port of one service."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str, port: int, service: Service, context: ssl.SSLContext | None = None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._context = context
        handler = type("Handler", (_Handler,), {"service": service, "tls": context is not None})
        super().__init__((address, port), handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 3600}, daemon=True).start()

    def server_bind(self) -> None:
        """Without the look-up of the host's name that the parent does: there may be no DNS yet."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self._context is not None:
            # The handshake belongs to the handler's thread: a slow client must not stop the others.
            connection = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the game."""


def bare(address: str) -> str:
    """An address without the IPv4-mapped prefix."""
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip)
