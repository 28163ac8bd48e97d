"""The server that is besieged and what it told, and the agent that is."""

import asyncio
import json
import os
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.siege.honest import HOME
from bench.siege.probe import fetch

# What is logged when all deadlines are moved, here and in earlier versions.
_MOVED = (
    "no reports could be received for a while",
    "nobody could be heard for a while",
    "deadlines moved by the server's own absence",
)
_FILES = 4096  # descriptors, as most services have
_CORES = sorted(os.sched_getaffinity(0))


def leave_a_core() -> None:
    """Keep this process, and those that it starts, off the core of who is besieged, where there are two."""
    os.sched_setaffinity(0, _CORES[:-1] or _CORES)


def idle() -> float:
    """Seconds that the core of who is besieged has had nothing to do, or waited for a disk (proc(5), /proc/stat)."""
    lines = Path("/proc/stat").read_text().splitlines()
    fields = next(line for line in lines if line.startswith(f"cpu{_CORES[-1]} ")).split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def _besieged() -> None:
    os.sched_setaffinity(0, _CORES[-1:])
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))


class Sink(asyncio.Protocol):
    """Takes webhooks: when each arrived, by the monotonic clock, and its body."""

    def __init__(self, got: list[tuple[float, dict[str, Any]]]) -> None:
        self.got, self.buffer = got, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        length = next((int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")), 0)
        if found and len(body) >= length:
            self.got.append((time.monotonic(), json.loads(body[:length])))
            self.buffer = body[length:]
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


class Process:
    """A process of one tree's, with its files and its log. `tree` has its own interpreter in `.venv`."""

    what = "server"

    def __init__(self, tree: Path, words: list[str], settings: dict[str, str]) -> None:
        self.tree = tree
        self.folder = Path(tempfile.mkdtemp(prefix="vs-siege-", dir="/var/tmp"))
        self.python = str(tree / ".venv" / "bin" / "python")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("VPN_SENTINEL")}
        self.env = clean | settings | {"VPN_SENTINEL_DATA_DIR": str(self.folder), "PYTHONPATH": str(tree / "src")}
        self.words, self.log = words, (self.folder / "log").open("w+")

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*self.words, self.python, "-m", "vpn_sentinel", self.what], cwd=self.tree, env=self.env, stdout=self.log,
            stderr=self.log, preexec_fn=_besieged,
        )  # fmt: skip

    def memory(self) -> float:
        """Resident, in MB."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def disk(self) -> float:
        """MB of its folder, the log apart."""
        return sum(f.stat().st_size for f in self.folder.iterdir() if f.is_file() and f.name != "log") / 1e6

    def ran(self) -> tuple[float, float]:
        """Seconds that its loop's thread has had a processor, and that it has waited for one (proc(5), schedstat)."""
        ran, waited, _ = Path(f"/proc/{self.process.pid}/schedstat").read_text().split()
        return int(ran) / 1e9, int(waited) / 1e9

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Server(Process):
    def __init__(self, tree: Path, sink: int, *, tls: bool, more: Mapping[str, str] | None = None) -> None:
        self.key, self.tls = secrets.token_hex(16), tls
        self.api, self.health, self.dashboard, self.canary = _ports(4)
        super().__init__(tree, [], {
            "VPN_SENTINEL_API_KEY": self.key, "VPN_SENTINEL_SERVER_API_PORT": str(self.api),
            "VPN_SENTINEL_SERVER_HEALTH_PORT": str(self.health), "VPN_SENTINEL_TRACE_URL": "http://127.0.0.1:9",
            "VPN_SENTINEL_SERVER_DASHBOARD_PORT": str(self.dashboard), "VPN_SENTINEL_HOME_NETWORKS": f"{HOME}/32",
            "VPN_SENTINEL_WEBHOOK_URL": f"http://127.0.0.1:{sink}/", "VPN_SENTINEL_WEBHOOK_ALLOW_PRIVATE": "true",
            "VPN_SENTINEL_CANARY_ZONE": "canary.example.org", "VPN_SENTINEL_CANARY_HOST": "127.0.0.1",
            "VPN_SENTINEL_CANARY_PORT": str(self.canary), "VPN_SENTINEL_CANARY_ADDRESSES": "127.0.0.1",
            **(more or {}),
        })  # fmt: skip
        if tls:
            cert, key = self.folder / "cert.pem", self.folder / "key.pem"
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                 "-days", "2", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(cert)],
                check=True, capture_output=True,
            )  # fmt: skip
            self.env |= {"VPN_SENTINEL_TLS_CERT_PATH": str(cert), "VPN_SENTINEL_TLS_KEY_PATH": str(key)}
        self.start()

    def command(self, *words: str) -> str:
        called = [self.python, "-m", "vpn_sentinel", *words]
        return subprocess.run(called, cwd=self.tree, env=self.env, capture_output=True, text=True, check=True).stdout

    def token(self, name: str) -> str:
        return next(word for word in self.command("token", "create", name).split() if word.startswith("vs_"))

    def said(self, since: int = 0) -> str:
        return (self.folder / "log").read_text(errors="replace")[since:]

    def moved(self, since: int) -> tuple[int, float]:
        """How often all deadlines were moved, and by how many seconds in all."""
        lines = [line for line in self.said(since).splitlines() if any(words in line for words in _MOVED)]
        return len(lines), sum(float(n) for line in lines for n in re.findall(r'seconds"?[=:]\s*"?([\d.]+)', line))

    async def lag(self) -> float | None:
        """The longest by which the loop was late in the last minute, in seconds, as the server itself tells it."""
        try:
            told = await asyncio.to_thread(fetch, self.health, "/metrics", 5.0)
        except OSError:
            return None
        found = re.search(r"^vpn_sentinel_loop_lag_seconds (\S+)", told, re.MULTILINE)
        return None if found is None else float(found[1])


class WatchedAgent(Process):
    """An agent in a network namespace where there is nothing but loopback: no tunnel, and no server to report to."""

    what = "agent"
    health = 8082

    def __init__(self, tree: Path) -> None:
        super().__init__(tree, ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"], {
            "VPN_SENTINEL_URL": "http://127.0.0.1:5000", "VPN_SENTINEL_API_KEY": "siege-key-0123456789",
            "VPN_SENTINEL_CLIENT_ID": "besieged", "VPN_SENTINEL_ALLOW_INSECURE": "true",
        })  # fmt: skip
        self.start()

    @property
    def inside(self) -> list[str]:
        """Words before a command that run it beside the agent."""
        return ["nsenter", "-t", str(self.process.pid), "-n"]


def _ports(count: int) -> list[int]:
    """Below those that the kernel gives to connections: of these there are thousands here, and they linger."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1000):
        with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            try:
                tcp.bind(("0.0.0.0", port))
                datagrams.bind(("0.0.0.0", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no ports are free")


def udp() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("127.0.0.1", 0))
    made.setblocking(False)
    return made
