"""What a running agent costs: memory (PSS) and CPU, beside an interpreter that does nothing but sleep in asyncio.

    python bench/agent.py [--seconds 60] [--mbit 100]   an agent at its default settings, in the lab (needs root), at
                                                        rest and then with a download through its tunnel
    python bench/agent.py --pid 4711                    an agent that runs somewhere

PSS is that of /proc/PID/smaps_rollup (proc(5)): shared pages count by their share. CPU is user and system time of
/proc/PID/stat over the time measured, as a share of one core, start-up left out. Prints one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.situations import traffic
from lab import Lab, Site
from lab.home import Home
from lab.nodes import Node

BUDGET = {"pss_mb": 25.0, "cpu_percent": 0.3}
BUSY_BUDGET = {"pss_mb": 25.0, "cpu_percent": 1.0}  # while traffic runs through the tunnel
KEY = "bench-key-0123456789"
SETTLE = 8.0  # seconds until start-up is over: first round, places, connection
TICK = os.sysconf("SC_CLK_TCK")


def pss_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def cpu_seconds(pid: int) -> float:
    # The process's name, in parentheses, may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def measure(pids: dict[str, int], seconds: float) -> dict[str, dict[str, float]]:
    """Watch all at once, so that they share their pages in the same way and meet the same disturbances."""
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    most = dict.fromkeys(pids, 0.0)
    began = time.perf_counter()
    while (left := began + seconds - time.perf_counter()) > 0:
        most = {name: max(most[name], pss_mb(pid)) for name, pid in pids.items()}
        time.sleep(min(1.0, left))
    took = time.perf_counter() - began
    return {
        name: {
            "pss_mb": round(most[name], 1),
            "cpu_percent": round(100 * (cpu_seconds(pid) - before[name]) / took, 3),
        }
        for name, pid in pids.items()
    }


@contextmanager
def bare() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "import asyncio; asyncio.run(asyncio.sleep(1e6))"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Scene:
    """An agent in the lab: its process, its site, and a host on the internet to download from."""

    agent: int
    site: Home
    internet: Node
    address: str

    def received(self) -> int:
        """Bytes that the tunnel's interface has taken in."""
        told = self.site.run(["cat", "/proc/net/dev"], check=True).stdout
        line = next(line for line in told.splitlines() if line.strip().startswith("wg0:"))
        return int(line.split(":")[1].split()[0])


@contextmanager
def in_lab(settings: dict[str, str]) -> Iterator[Scene]:
    """An agent behind WireGuard that reports to a server on the lab's internet."""

    with tempfile.TemporaryDirectory() as folder, Lab([Site("bench", vpn="wireguard", kill_switch=True)]) as lab:
        serving = {"VPN_SENTINEL_API_KEY": KEY, "VPN_SENTINEL_DATA_DIR": f"{folder}/server"}
        lab.srv.spawn([sys.executable, "-m", "vpn_sentinel", "server"], env=serving, log="server")
        lab.srv.wait_port(5000, 20)
        watching = {
            "VPN_SENTINEL_URL": f"http://{lab.server4}:5000",
            "VPN_SENTINEL_ALLOW_INSECURE": "true",
            "VPN_SENTINEL_API_KEY": KEY,
            "VPN_SENTINEL_DATA_DIR": f"{folder}/agent",
            **settings,
        }
        agent = lab.site("bench").spawn([sys.executable, "-m", "vpn_sentinel", "agent"], env=watching, log="agent")
        time.sleep(SETTLE)
        yield Scene(agent.pid, lab.site("bench"), lab.srv, lab.server4)
        agent.stop()


def under_load(scene: Scene, pids: dict[str, int], mbit: float, seconds: float) -> dict[str, dict[str, float]]:
    """Measure while the site downloads `mbit` Mbit/s through its tunnel, and note what really came."""
    fountain = traffic.fountain(scene.internet)
    download = traffic.download(scene.site, scene.address, kbit=1000 * mbit, seconds=seconds + 10)
    time.sleep(2.0)
    before, began = scene.received(), time.perf_counter()
    found = measure(pids, seconds)
    came = 8 * (scene.received() - before) / 1e6 / (time.perf_counter() - began)
    for process in (download, fountain):
        process.stop()
    return {f"{name} at {came:.0f} Mbit/s": figures for name, figures in found.items()}


def write_table(found: dict[str, dict[str, float]], seconds: float) -> None:
    lines = ["| process | PSS | CPU of one core |", "|---|---|---|"]
    lines += [f"| {name} | {f['pss_mb']:.1f} MB | {f['cpu_percent']:.2f} % |" for name, f in found.items()]
    lines += ["", f"Each over {seconds:.0f} s behind WireGuard in the lab, default settings, side by side."]
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "agent.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--mbit", type=float, default=0.0, help="then also with so much traffic in the tunnel")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the agent")
    given = parser.parse_args(words)
    if given.pid is not None and given.mbit:
        parser.error("--mbit needs the lab: it goes without --pid")
    settings = {f"VPN_SENTINEL_{name}": value for name, _, value in (item.partition("=") for item in given.set)}
    with bare() as reference:
        if given.pid is not None:
            found = measure({"agent": given.pid, "bare_asyncio": reference}, given.seconds)
        else:
            with in_lab(settings) as scene:
                pids = {"agent": scene.agent, "bare_asyncio": reference}
                found = measure(pids, given.seconds)
                if given.mbit:
                    found |= under_load(scene, pids, given.mbit, given.seconds)
    agents = {name: figures for name, figures in found.items() if name.startswith("agent")}
    within = all(
        figures[name] <= most
        for agent, figures in agents.items()
        for name, most in (BUDGET if agent == "agent" else BUSY_BUDGET).items()
    )
    write_table(found, given.seconds)
    print(
        json.dumps(
            {"seconds": given.seconds, **found, "budget": BUDGET, "busy": BUSY_BUDGET, "within_budget": within},
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
