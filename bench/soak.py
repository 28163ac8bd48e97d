"""Twelve healthy tunnels for half an hour, with default settings: not one alarm, and what it costs.

    python -m bench soak [--minutes 30]            needs root

WireGuard and OpenVPN, with kill switch and without; one idle without a keepalive, one that loses 5 % of its packets
(below the 20 % that count), one with light and one with heavy traffic. Any transition away from protected, and any
message beside the server's start and twelve tunnels that connect, is a false alarm: it is printed, and the run fails.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.agent import cpu_seconds, pss_mb
from bench.situations import traffic
from lab import Lab, Site, until
from lab.home import Home

KEY = "soak-key-0123456789"
CHAT = 4000
LOSS = 5  # percent
LIGHT, HEAVY = 500.0, 20_000.0  # kbit/s
SETTLE = 15.0  # seconds until start-up is over
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Tunnel:
    site: Site
    what: str = "nothing special"


def tunnels() -> list[Tunnel]:
    """Six of each kind; every second one behind a kill switch."""
    made = [
        Tunnel(site=Site("idle", keepalive=0), what="idle: no keepalive, no traffic but the agent's"),
        Tunnel(site=Site("lossy"), what=f"loses {LOSS} % of what comes back"),
        Tunnel(site=Site("light"), what=f"carries {LIGHT / 1000:g} Mbit/s"),
        Tunnel(site=Site("heavy", kill_switch=False), what=f"carries {HEAVY / 1000:g} Mbit/s"),
        Tunnel(site=Site("public", resolver="public"), what="resolves by 1.1.1.1 through the tunnel"),
        Tunnel(site=Site("dropped", vpn="openvpn", ipv6="dropped"), what="drops IPv6"),
    ]
    for number in range(len(made), 12):
        kind = "openvpn" if number > 6 else "wireguard"
        provider = ("nl", "ch", "us")[number % 3]
        closed = number % 2 == 0
        site = Site(f"plain{number}", vpn=kind, provider=provider, kill_switch=closed)
        made.append(Tunnel(site=site))
    return made


def start_server(lab: Lab, folder: Path) -> Any:
    settings = {
        "VPN_SENTINEL_API_KEY": KEY,
        "VPN_SENTINEL_DATA_DIR": str(folder / "server"),
        "TELEGRAM_BOT_TOKEN": "400000:soak-token",
        "TELEGRAM_CHAT_ID": str(CHAT),
    }
    server = lab.srv.spawn([sys.executable, "-m", "vpn_sentinel", "server"], env=settings, log="server")
    lab.srv.wait_port(5000, 20)
    return server


def start_agent(lab: Lab, home: Home, folder: Path) -> Any:
    settings = {
        "VPN_SENTINEL_URL": f"http://{lab.server4}:5000",
        "VPN_SENTINEL_ALLOW_INSECURE": "true",
        "VPN_SENTINEL_API_KEY": KEY,
        "VPN_SENTINEL_CLIENT_ID": home.name,
        "VPN_SENTINEL_DATA_DIR": str(folder / home.name),
        "VPN_SENTINEL_HOME_NETWORKS": ",".join(home.home_networks),
        "VPN_SENTINEL_GEO_DB": str(lab.mmdb),
    }
    return home.spawn([sys.executable, "-m", "vpn_sentinel", "agent"], env=settings, log="agent")


def api(lab: Lab, path: str) -> Any:
    url = f"http://127.0.0.1:5000/api/v1{path}"
    answer = lab.http("srv", "GET", url, headers={"X-API-Key": KEY}, timeout=10)
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.text[:200]}")
    return answer.json()


def oldest_handshake(home: Home) -> float | None:
    """Seconds since WireGuard's last handshake, or None where there is none to ask."""
    if home.site.vpn != "wireguard":
        return None
    said = home.run(["wg", "show", "wg0", "latest-handshakes"]).stdout.split()
    return time.time() - float(said[-1]) if said and said[-1] != "0" else None


def false_alarms(lab: Lab, expected: Sequence[str], since_started: float) -> list[str]:
    """Everything that moved or was told and should not have been."""
    found = []
    for name in expected:
        moves = api(lab, f"/tunnels/{name}/history?limit=500")["transitions"]
        found += [
            f"{name}: {m['old']} -> {m['new']} at {m['at']}: {'; '.join(f['message'] for f in m['findings'])}"
            for m in moves
            if m["new"] != "protected" or m["old"] != "pending"
        ]
        state = api(lab, f"/tunnels/{name}")["state"]
        if state != "protected":
            found.append(f"{name} is {state}")
    messages = lab.telegram.messages(chat_id=CHAT)
    late = [m for m in messages if m["time"] > since_started]
    found += [f"told: {m['plain'].splitlines()[0]}" for m in late]
    if len(messages) - len(late) != len(expected) + 1:
        found.append(f"{len(messages) - len(late)} messages at the start, {len(expected) + 1} were due")
    return found


def watch(lab: Lab, agents: Mapping[str, Any], server: Any, seconds: float) -> dict[str, Any]:
    """Let them run; every ten seconds memory and the age of the idle tunnel's handshake are looked at."""
    everyone = {**{n: a.pid for n, a in agents.items()}, "server": server.pid}
    before = {name: cpu_seconds(pid) for name, pid in everyone.items()}
    most, oldest = dict.fromkeys(everyone, 0.0), 0.0
    began = time.perf_counter()
    while (left := began + seconds - time.perf_counter()) > 0:
        dead = [n for n, p in {**agents, "server": server}.items() if p.poll() is not None]
        if dead:
            raise RuntimeError(f"ended by itself: {', '.join(dead)}")
        most = {name: max(most[name], pss_mb(pid)) for name, pid in everyone.items()}
        oldest = max(oldest, oldest_handshake(lab.site("idle")) or 0.0)
        time.sleep(min(10.0, left))
    took = time.perf_counter() - began
    cpu = {name: 100 * (cpu_seconds(pid) - before[name]) / took for name, pid in everyone.items()}
    return {"seconds": took, "cpu_percent": cpu, "pss_mb": most, "oldest_handshake_s": oldest}


def report(figures: Mapping[str, Any], alarms: Sequence[str], plan: Sequence[Tunnel], counts: Mapping[str, int]) -> str:
    cpu, pss = figures["cpu_percent"], figures["pss_mb"]
    agents = [t.site.name for t in plan]
    lines = [
        "# Soak",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}, {figures['seconds'] / 60:.1f} minutes, {len(plan)} healthy tunnels, "
        f"default settings, two shared cores. **False alarms: {len(alarms)}.** "
        f"{counts['observations']} observations, {counts['transitions']} transitions, {counts['messages']} messages.",
        "",
        *(f"- {alarm}" for alarm in alarms),
        "| process | what is special | CPU of one core | PSS |",
        "|---|---|---|---|",
    ]
    for t in plan:
        switch = "kill switch" if t.site.kill_switch else "no kill switch"
        name = t.site.name
        lines.append(f"| {name} | {t.site.vpn}, {switch}; {t.what} | {cpu[name]:.2f} % | {pss[name]:.1f} MB |")
    for word, of in (("median", statistics.median), ("worst", max)):
        lines.append(
            f"| agents, {word} | | {of([cpu[n] for n in agents]):.2f} % | {of([pss[n] for n in agents]):.1f} MB |"
        )
    lines += [
        f"| server | | {cpu['server']:.2f} % | {pss['server']:.1f} MB |",
        "",
        f"The idle tunnel's handshake was at most {figures['oldest_handshake_s']:.0f} s old. WireGuard makes a new one "
        "every 120 s while packets flow, and the agent's own canaries and pulses flow; that an old one alone means "
        "nothing is held by the judge's tests.",
    ]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--logs", type=Path, default=None, help="where the lab's logs stay")
    given = parser.parse_args(words)
    plan = tunnels()
    names = [t.site.name for t in plan]
    with (
        tempfile.TemporaryDirectory(prefix="vs-soak-") as base,
        Lab([t.site for t in plan], directory=given.logs) as lab,
    ):
        folder = Path(base)
        server = start_server(lab, folder)
        lab.site("lossy").loss(LOSS)
        agents = {name: start_agent(lab, lab.site(name), folder) for name in names}
        source = traffic.fountain(lab.srv)
        for name, kbit in (("light", LIGHT), ("heavy", HEAVY)):
            traffic.download(lab.site(name), lab.server4, kbit=kbit, seconds=60 * given.minutes + 60)

        def all_told() -> bool:
            return len(lab.telegram.messages(chat_id=CHAT)) >= len(names) + 1

        until(all_told, 90, "all tunnels to be told as connected", interval=0.5)
        time.sleep(SETTLE)
        started = time.time()
        figures = watch(lab, agents, server, 60 * given.minutes)
        alarms = false_alarms(lab, names, started)
        history = [api(lab, f"/tunnels/{n}/history?limit=500") for n in names]
        counts = {
            "observations": sum(len(h["observations"]) for h in history),
            "transitions": sum(len(h["transitions"]) for h in history),
            "messages": len(lab.telegram.messages(chat_id=CHAT)),
        }
        source.stop()
    text = report(figures, alarms, plan, counts)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "soak.md").write_text(text, encoding="utf-8")
    raw = {**figures, **counts, "false_alarms": alarms}
    (RESULTS / "soak.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    print(text)
    sys.exit(f"{len(alarms)} false alarms" if alarms else 0)
