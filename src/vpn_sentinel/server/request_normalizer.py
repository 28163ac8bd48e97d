"""The same rules for all TCP listeners: spelling of paths, HEAD and OPTIONS.

A proxy in front may protect some paths; another spelling of a path must not give the same answer.
"""

from typing import Any, Final

from vpn_sentinel.wire import problem
from vpn_sentinel.wire.codec import encode

# TRACE is a method that no route has: the answer is 405, with the methods that there are.
_METHOD_FOR_APP: Final = {"HEAD": "GET", "OPTIONS": "TRACE"}
_NOT_FOUND: Final = encode(problem.problem(404, "Not Found"))


class RequestNormalizer:
    """An ASGI application in front of another, which then handles only GET, POST and the like.

    - A path with an empty segment (`//`) does not exist: 404. One slash at the end is removed.
    - HEAD is GET without the content (RFC 9110, section 9.3.2); an endless answer ends after its headers.
    - OPTIONS is 204 with `Allow` (section 9.3.7), for everyone: it shows no more than 405 does.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if "//" in path:
            await _refuse(scope, receive, send)
            return
        if path.endswith("/") and path != "/":
            scope = {**scope, "path": path[:-1]}
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        if method in _METHOD_FOR_APP:
            scope = {**scope, "method": _METHOD_FOR_APP[method]}
        await self._app(scope, receive, _Answer(send, method))


class _Answer:
    """ASGI's `send` for one request with `method`."""

    def __init__(self, send: Any, method: str) -> None:
        self._send, self._method = send, method
        self._over = False

    async def __call__(self, message: Any) -> None:
        if self._over:
            return
        if message["type"] == "http.response.start":
            if message["status"] == 405:
                message = self._refusal(message)
            self._over = self._method == "HEAD" or message["status"] == 204
        await self._send(message)
        if self._over:
            await self._send({"type": "http.response.body", "body": b""})

    def _refusal(self, message: Any) -> Any:
        """The 405 with all methods in `Allow`; as 204, it is the answer to OPTIONS."""
        headers = message["headers"]
        allow = next((value for name, value in headers if name.lower() == b"allow"), b"")
        methods = {method.strip() for method in allow.split(b",") if method.strip()} | {b"OPTIONS"}
        if b"GET" in methods:
            methods.add(b"HEAD")
        is_options = self._method == "OPTIONS"
        replaced = (b"allow", b"content-type", b"content-length") if is_options else (b"allow",)
        kept = [(name, value) for name, value in headers if name.lower() not in replaced]
        status = 204 if is_options else 405
        return {**message, "status": status, "headers": [*kept, (b"allow", b", ".join(sorted(methods)))]}


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close"})  # before it is accepted, so the answer is 403
        return
    headers = [
        (b"content-type", problem.CONTENT_TYPE.encode()),
        (b"content-length", str(len(_NOT_FOUND)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        problem.MARK_BYTES,
    ]
    await send({"type": "http.response.start", "status": 404, "headers": headers})
    await send({"type": "http.response.body", "body": _NOT_FOUND})
