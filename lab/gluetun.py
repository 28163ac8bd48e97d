"""A stand-in for gluetun: its control server and its health server, inside a site's own namespace.

It says whatever it is told to say, whether or not a tunnel is there. `python -m lab.gluetun CONTROL_SOCKET`.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

from lab.client import Control, Row, Service
from lab.nodes import Process
from lab.outside.control import serve
from lab.outside.service import Listener, Reply, Request
from lab.outside.service import Service as Answering

CONTROL, HEALTH = 8000, 9999


class ControlServer(Answering):
    """The routes of gluetun's control server that are safe to ask, behind an API key or a login."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, Any] = {"status": "running", "dns": "running", "public_ip": "", "port": 0, "healthy": ""}
        self._key: str | None = None
        self._login: tuple[str, str] | None = None
        self._old = False

    def say(self, **said: Any) -> None:
        """What it says from now on: status=, dns=, public_ip=, port=, healthy= (an error's text, or empty)."""
        if unknown := said.keys() - self._said.keys():
            raise ValueError(f"gluetun says nothing of {', '.join(sorted(unknown))}")
        self._said |= said

    def protect(self, key: str | None = None, user: str | None = None, password: str = "") -> None:
        """Ask for a key, or for a login; neither: everybody may read."""
        self._key = key
        self._login = (user, password) if user is not None else None

    def age(self) -> None:
        """Be an older release, which tells its forwarded port by another route."""
        self._old = True

    def answer(self, request: Request) -> Reply:
        if not self._admits(request):
            return Reply(401, b"Unauthorized\n", kind="text/plain")
        port = int(self._said["port"])
        routes: dict[str, dict[str, Any]] = {
            "/v1/vpn/status": {"status": self._said["status"]},
            "/v1/dns/status": {"status": self._said["dns"]},
            "/v1/publicip/ip": {"public_ip": self._said["public_ip"]},
        }
        if self._old:
            routes["/v1/openvpn/portforwarded"] = {"port": port}
        else:
            routes["/v1/portforward"] = {"port": port, "ports": [port] if port else []}
            if request.path == "/v1/openvpn/portforwarded":
                return Reply(301, b"", {"Location": "/v1/portforward"})
        if request.path in routes and request.method == "GET":
            return Reply(200, routes[request.path])
        return Reply(404, b"404 page not found\n", kind="text/plain")

    def _admits(self, request: Request) -> bool:
        if self._key is not None:
            return request.headers.get("x-api-key") == self._key
        if self._login is not None:
            pair = base64.b64encode(":".join(self._login).encode()).decode()
            return request.headers.get("authorization") == f"Basic {pair}"
        return True

    def health(self) -> str:
        return str(self._said["healthy"])


class HealthServer(Answering):
    """200, or 500 with the error's text; no login."""

    def __init__(self, control: ControlServer) -> None:
        super().__init__()
        self._control = control

    def answer(self, request: Request) -> Reply:  # noqa: ARG002 - any path is the same
        error = self._control.health()
        return Reply(500 if error else 200, error.encode(), kind="text/plain")


class Gluetun(Service):
    """The test's side: what it shall say, and who asked."""

    def __init__(self, control: Control, process: Process) -> None:
        super().__init__(control, "gluetun")
        self._process = process
        self.url = f"http://127.0.0.1:{CONTROL}"

    def say(self, **said: Any) -> None:
        """status=, dns=, public_ip=, port=, healthy=."""
        self._call("say", **said)

    def protect(self, key: str | None = None, user: str | None = None, password: str = "") -> None:
        """Ask for a key, or for a login."""
        self._call("protect", key, user, password)

    def age(self) -> None:
        """Be an older release."""
        self._call("age")

    def asked(self) -> set[str]:
        """Every method and route that was asked so far."""
        rows: list[Row] = self.requests()
        return {f"{row['method']} {row['path']}" for row in rows}

    def stop(self) -> None:
        self._control.close()
        self._process.stop()


def main(socket: Path) -> None:
    control = ControlServer()
    Listener("127.0.0.1", CONTROL, control)
    Listener("127.0.0.1", HEALTH, HealthServer(control))
    serve(socket, {"gluetun": control})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
