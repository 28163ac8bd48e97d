"""The stand-ins' control socket: what a test may call."""

from __future__ import annotations

import json
import socketserver
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.outside.service import Service


class _Control(socketserver.StreamRequestHandler):
    """One line of JSON in, {"service", "call", "args", "kwargs"}; one line out, {"ok"} or {"error"}."""

    services: Mapping[str, Service]

    def handle(self) -> None:
        for line in self.rfile:
            order = json.loads(line)
            try:
                answer = {"ok": self._call(**order)}
            except Exception as error:  # noqa: BLE001 - every failure belongs to the caller on the other side
                answer = {"error": f"{type(error).__name__}: {error}"}
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _call(self, service: str, call: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if call.startswith("_"):
            raise AttributeError(call)
        return getattr(self.services[service], call)(*args, **kwargs)


class _ControlServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def serve(socket: Path, services: Mapping[str, Service]) -> None:
    """Serve for ever. Bound last: who can reach the socket knows that everything else listens."""
    handler = type("Handler", (_Control,), {"services": services})
    with _ControlServer(str(socket), handler) as server:
        server.serve_forever()
