"""The real server and agent as processes, what they logged, and what people would see of them by HTTP."""

import contextlib
import http.client
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.integration.test_durability import free_port, wait_until

PROGRAM = [sys.executable, "-m", "vpn_sentinel"]
KEY = "a-key-of-the-field-0123456789"
HOME, EXIT = "83.46.112.77", "193.32.249.70"


class Process:
    """One program with a log file, ended by `close`."""

    def __init__(self, command: str, folder: Path, settings: Mapping[str, str]) -> None:
        self.log = folder / f"{command.split()[0]}.log"
        ours = {name: value for name, value in os.environ.items() if not name.startswith("VPN_SENTINEL_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, *command.split()], env={**ours, **settings}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


class Server(Process):
    """A server on ports of its own. `more` are settings by their whole names."""

    def __init__(self, folder: Path, url: str | None = None, **more: str) -> None:
        self.port, self.health, dashboard = free_port(), free_port(), free_port()
        settings = {
            "VPN_SENTINEL_DATABASE_URL": url or f"sqlite:///{folder}/sentinel.db",
            "VPN_SENTINEL_DATA_DIR": str(folder),
            "VPN_SENTINEL_API_KEY": KEY,
            "VPN_SENTINEL_SERVER_API_PORT": str(self.port),
            "VPN_SENTINEL_SERVER_HEALTH_PORT": str(self.health),
            "VPN_SENTINEL_SERVER_DASHBOARD_PORT": str(dashboard),
            "VPN_SENTINEL_SERVER_RATE_LIMIT_REQUESTS": "1000000",
            "VPN_SENTINEL_HOME_NETWORKS": HOME,
            "VPN_SENTINEL_TRACE_URL": "http://127.0.0.1:9",
        }
        super().__init__("server", folder, settings | more)
        wait_until(lambda: self.process.poll() is not None or self._is_ready(), 60, "the server starts")
        assert self.process.poll() is None, self.said()

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ready()[0] == 200 and bool(self.ask("/api/v1/whoami"))
        return False

    def ask(
        self, path: str, method: str = "GET", body: object = None, port: int = 0, **headers: str
    ) -> tuple[int, Any]:
        """One request; the status, and what was said as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=20)
        try:
            fields = {"X-API-Key": KEY, "Content-Type": "application/json"}
            fields |= {name.replace("_", "-"): value for name, value in headers.items()}
            content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, fields)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def keepalive(self, name: str, address: str = "", **headers: str) -> tuple[int, Any]:
        """What the replaced system's client sends."""
        said = {"client_id": name, **({"public_ip": address} if address else {})}
        return self.ask("/api/v1/keepalive", "POST", said, **headers)  # type: ignore[arg-type]

    def ready(self) -> tuple[int, Any]:
        return self.ask("/health/ready", port=self.health)

    def state(self, name: str) -> str | None:
        status, found = self.ask(f"/api/v1/tunnels/{name}")
        return str(found["state"]) if status == 200 else None


class Receiver(http.server.ThreadingHTTPServer):
    """Telegram or a webhook: answers as `says` tells for each body that comes, and keeps what it took."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[tuple[float, str, dict[str, Any]]] = []
        self.took: list[dict[str, Any]] = []
        self.says: Callable[[dict[str, Any]], tuple[int, str, bytes]] = lambda _: (200, "application/json", b"{}")
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                receiver.asked.append((time.monotonic(), self.path, body))
                status, kind, content = receiver.says(body)
                if status < 300 and kind == "application/json":
                    receiver.took.append(body)
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A server that is stopped resets its connections."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()
