"""Durable keepalives a second, beside a bare ASGI route on the same server and Flask answering from memory.

Each server runs alone on core 0, the load on core 1; the three take turns, so a slow minute of the machine slows all.
"""

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

KEY = "bench-key-0123456789"
CONNECTIONS = 64
SECONDS = 3.0
ROUNDS = 3
NAMES = 10_000
HERE = Path(__file__).parent

Figures = dict[str, float]


class Server:
    """One program under load, on core 0."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], port: int, path: str) -> None:
        self.name, self.port, self.path = name, port, path
        self.process = subprocess.Popen(
            ["taskset", "-c", "0", *command],
            env={**os.environ, **env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"{name} did not start")

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def run(self) -> Figures:
        before = self.cpu()
        words = [str(self.port), self.path, str(CONNECTIONS), str(SECONDS), str(NAMES), KEY]
        done = subprocess.run(
            ["taskset", "-c", "1", sys.executable, "-m", "bench.load", *words],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        figures: Figures = json.loads(done.stdout)
        figures["cpu_us"] = 1e6 * (self.cpu() - before) / max(1.0, figures["requests"])
        return figures

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def serving(data: str, api: int, health: int) -> dict[str, str]:
    """Settings of a server on loopback that shows no dashboard and asks nobody where it is."""
    return {
        "VPN_SENTINEL_DATA_DIR": data,
        "VPN_SENTINEL_API_KEY": KEY,
        "VPN_SENTINEL_SERVER_API_PORT": str(api),
        "VPN_SENTINEL_SERVER_HEALTH_PORT": str(health),
        "VPN_SENTINEL_SERVER_WEB_DASHBOARD_ENABLED": "false",
        "VPN_SENTINEL_TRACE_URL": "http://127.0.0.1:9",
    }


def servers(data: Path) -> list[Server]:
    api, health, dashboard, bare, flask = (free_port() for _ in range(5))
    settings = {
        "VPN_SENTINEL_DATA_DIR": str(data),
        "VPN_SENTINEL_API_KEY": KEY,
        "VPN_SENTINEL_SERVER_API_PORT": str(api),
        "VPN_SENTINEL_SERVER_HEALTH_PORT": str(health),
        "VPN_SENTINEL_SERVER_DASHBOARD_PORT": str(dashboard),
        "VPN_SENTINEL_SERVER_RATE_LIMIT_REQUESTS": "1000000",
        "VPN_SENTINEL_HOME_NETWORKS": "198.51.100.0/24",
        "VPN_SENTINEL_TRACE_URL": "http://127.0.0.1:9",
    }
    python = sys.executable
    return [
        Server("vpn-sentinel", [python, "-m", "vpn_sentinel", "server"], settings, api, "/api/v1/keepalive"),
        Server("bare ASGI", [python, "-m", "bench.bare_asgi", str(bare)], {}, bare, "/api/v1/keepalive"),
        Server("Flask threaded", [python, "-m", "bench.flask_memory", str(flask)], {}, flask, "/api/v1/keepalive"),
    ]


def stored(server: Server) -> int:
    """How many tunnels the server says it holds, asked over its API."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/api/v1/summary", headers={"X-API-Key": KEY})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return int(json.load(answer)["total"])


def main(_words: Sequence[str] = ()) -> None:
    data = Path(
        tempfile.mkdtemp(prefix="vs-bench-", dir="/var/tmp")
    )  # a disk, not memory: fsync must cost what it costs
    running = servers(data)
    try:
        for server in running:
            server.run()  # warm
        rounds: dict[str, list[Figures]] = {s.name: [] for s in running}
        for _ in range(ROUNDS):
            for server in running:
                rounds[server.name].append(server.run())
        rss = running[0].rss_mb()
        tunnels = stored(running[0])
    finally:
        for server in running:
            server.stop()
        shutil.rmtree(data, ignore_errors=True)
    report(rounds, rss, tunnels)


def report(rounds: dict[str, list[Figures]], rss: float, tunnels: int) -> None:
    middle = {n: {k: statistics.median(f[k] for f in figures) for k in figures[0]} for n, figures in rounds.items()}
    own = middle["vpn-sentinel"]
    lines = [
        "| server | requests/s | CPU/request | p50 | p99 | beside it |",
        "|---|---|---|---|---|---|",
    ]
    for name, f in middle.items():
        lines.append(
            f"| {name} | {f['per_second']:,.0f} | {f['cpu_us']:.0f} µs | {f['p50_ms']:.1f} ms | {f['p99_ms']:.1f} ms "
            f"| {own['per_second'] / f['per_second']:.2f}x |"
        )
    lines.append("")
    lines.append(
        f"{CONNECTIONS} connections, {ROUNDS} rounds of {SECONDS:.0f} s each in turn, medians; "
        f"server {rss:.0f} MB RSS with {tunnels:,} tunnels; refused: {own['refused']:.0f}."
    )
    text = "\n".join(lines)
    print(text)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "ingest.md").write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except urllib.error.URLError as e:
        sys.exit(f"bench: {e}")
