"""A real agent and a real server with something between them that lets no WebSocket through."""

import base64
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.integration.program import KEY, Process, Server
from tests.integration.test_durability import free_port, wait_until

ARRIVES = 30.0  # seconds until reports go by POST: two tries of a WebSocket that is held take most of it


def page(status: str, *fields: str, body: bytes = b"<html>You are not allowed to do that.</html>") -> bytes:
    lines = ["HTTP/1.1 " + status, "Content-Type: text/html", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


ACCEPTED = b"(accepted, and then)"
ANSWERS: dict[str, bytes | None] = {
    "401": page("401 Unauthorized", 'WWW-Authenticate: Basic realm="proxy"'),
    "302": page("302 Found", "Location: https://login.example/"),
    "held-unanswered": None,
    "held-open": ACCEPTED,
    "403-page": page("403 Forbidden"),
    "407": page("407 Proxy Authentication Required", "Proxy-Authenticate: Basic"),
    "511": page("511 Network Authentication Required"),
    "200-page": page("200 OK"),
    "400-nginx": page("400 Bad Request", "Server: nginx"),
    "426": page("426 Upgrade Required"),
    "502": page("502 Bad Gateway"),
    "json-401": page("401 Unauthorized", body=b'{"message": "No API key found in request"}'),
    "reset": b"",
    "accepted-and-closed": ACCEPTED + b"closed",
    "accepted-and-garbage": ACCEPTED + b"\xff\xff\xff\xff garbage",
}


class Between(threading.Thread):
    """Takes connections for a server; a WebSocket's first request gets `answer`, everything else passes."""

    def __init__(self, to: int, answer: bytes | None) -> None:
        super().__init__(daemon=True)
        self.to, self.answer = to, answer
        self.refused = self.passed = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                taken, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=[taken], daemon=True).start()

    def _serve(self, taken: socket.socket) -> None:
        with taken, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (part := taken.recv(65536)):
                    return
                head += part
            if head.startswith(b"GET") and b"upgrade: websocket" in head.lower():
                self.refused += 1
                self._refuse(taken, head)
                return
            self.passed += 1
            with socket.create_connection(("127.0.0.1", self.to)) as server:
                server.sendall(head)
                back = threading.Thread(target=_pump, args=[server, taken], daemon=True)
                back.start()
                _pump(taken, server)
                back.join(5)

    def _refuse(self, taken: socket.socket, head: bytes) -> None:
        answer = self.answer
        if answer is not None and answer.startswith(ACCEPTED):
            fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n") if b": " in line)
            key = {name.lower(): value for name, value in fields.items()}[b"sec-websocket-key"]
            digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False).digest()
            taken.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
            )
            if rest := answer.removeprefix(ACCEPTED):
                taken.sendall(rest)
                time.sleep(0.2)
                return
        elif answer is not None:
            taken.sendall(answer)
            return
        while taken.recv(65536):
            pass  # held for as long as the agent likes

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(65536):
            sink.sendall(part)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with closing(Server(tmp_path_factory.mktemp("server"))) as made:
        yield made


def agent(folder: Path, name: str, port: int, key: str = KEY, **more: str) -> Process:
    settings = {
        "VPN_SENTINEL_URL": f"http://127.0.0.1:{port}",
        "VPN_SENTINEL_API_KEY": key,
        "VPN_SENTINEL_CLIENT_ID": name,
        "VPN_SENTINEL_DATA_DIR": str(folder),
        "VPN_SENTINEL_HEALTH_PORT": str(free_port()),
        "VPN_SENTINEL_TRACE_URL": "http://127.0.0.1:9",
        "VPN_SENTINEL_INTERVAL": "5",
    }
    return Process("agent", folder, settings | more)


def reports(server: Server, name: str) -> int:
    status, found = server.ask(f"/api/v1/tunnels/{name}/history?limit=50")
    return len(found["observations"]) if status == 200 else 0


@pytest.mark.slow
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_where_no_websocket_passes_reports_go_by_post_and_the_key_is_not_blamed(
    server: Server, answer: bytes | None, tmp_path: Path
) -> None:
    name = f"agent-{list(ANSWERS.values()).index(answer)}"
    with closing(Between(server.port, answer)) as between, closing(agent(tmp_path, name, between.port)) as made:
        wait_until(lambda: reports(server, name), ARRIVES, "a report is stored")
        assert made.process.poll() is None
        said = made.said()
    assert between.refused >= 1
    assert between.passed >= 1
    assert "go by POST" in said
    assert "key" not in said.lower(), said


@pytest.mark.slow
def test_what_refuses_everything_is_not_the_server_and_the_key_is_not_blamed(server: Server, tmp_path: Path) -> None:
    """The same where POST is refused too, as by a captive portal; once it lets the agent pass, the reports arrive."""
    portal = page("401 Unauthorized", 'WWW-Authenticate: Basic realm="proxy"')

    class Portal(Between):
        def _serve(self, taken: socket.socket) -> None:
            if self.answer is None:
                super()._serve(taken)
                return
            with taken, suppress(OSError):
                taken.recv(65536)
                self.refused += 1
                taken.sendall(self.answer)

    with closing(Portal(server.port, portal)) as between, closing(agent(tmp_path, "portal", between.port)) as made:
        wait_until(lambda: between.refused >= 4, ARRIVES, "it is tried again and again")
        assert "key" not in made.said().lower(), made.said()
        between.answer = None
        wait_until(lambda: reports(server, "portal") >= 2, 2 * ARRIVES, "its reports are stored")


@pytest.mark.slow
def test_the_servers_own_word_about_a_key_is_believed(server: Server, tmp_path: Path) -> None:
    with (
        closing(Between(server.port, page("401 Unauthorized"))) as between,
        closing(agent(tmp_path, "stranger", between.port, key="no-key-of-ours")) as made,
    ):
        wait_until(lambda: "key" in made.said().lower(), ARRIVES, "the key is named")
    assert reports(server, "stranger") == 0
