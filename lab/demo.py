"""`make demo`: three tunnels in the lab, a server that watches them, and the faults that it must tell apart.

Everything is real but the internet: WireGuard and OpenVPN, the agents, the server. The Telegram messages go to a
stand-in of the Bot API and are printed as they arrive. The dashboard is reached from this machine's browser.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lab import Home, Lab, Node, Site, until
from lab.nodes import import_path

SITES: Final = [
    Site("amsterdam", vpn="wireguard", provider="nl", kill_switch=True),
    Site("zurich", vpn="openvpn", provider="ch", kill_switch=False),
    Site("newyork", vpn="wireguard", provider="us", kill_switch=True),
]
COUNTRY: Final = {"amsterdam": "NL", "zurich": "CH", "newyork": "US"}
CHAT: Final = 4711
# Seconds. Shorter than the defaults (30 and 15), so that nobody has to wait for half a minute to see a silence.
INTERVAL: Final = 4
GRACE_DEGRADED: Final = 6
API_PORT, HEALTH_PORT, DASHBOARD_PORT = 5000, 8081, 8080


class Messages:
    """Prints what the bot tells its chat, as it arrives, and lets the walk wait for it."""

    def __init__(self, lab: Lab) -> None:
        self._telegram = lab.telegram
        self._shown = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Messages:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(2)

    @property
    def count(self) -> int:
        return self._shown

    def wait(self, after: int, words: tuple[str, ...], limit: float) -> dict[str, Any]:
        """The first message beyond `after` whose first line holds all `words`, once it has been printed."""

        def found() -> dict[str, Any] | None:
            told = self._telegram.messages()[after : self._shown]
            return next((m for m in told if all(w in m["plain"].partition("\n")[0] for w in words)), None)

        message = until(found, limit, f"a message that says {' '.join(words)}", interval=0.05)
        assert message is not None
        return message

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            with contextlib.suppress(OSError, ValueError):  # the lab is going down
                for message in self._telegram.messages()[self._shown :]:
                    _show(message["plain"])
                    self._shown += 1


def _show(text: str) -> None:
    first, *rest = text.splitlines()
    print("\n".join((f"    Telegram │ {first}", *(f"             │ {line}" for line in rest))), flush=True)


@dataclass(frozen=True)
class Step:
    """One fault at one site: what to say of it, what is told of it, and what is told once it is healed."""

    site: str
    say: str
    fault: Callable[[Home], object]
    told: str
    expect: str
    limit: float
    recovered: str = "protected again"


STEPS: Final = (
    Step(
        "zurich",
        "The tunnel of zurich is deleted, and there is no kill switch: traffic leaves from home.",
        lambda home: home.delete_tunnel(),
        "is LEAKING",
        "A leak has no grace: the next packet shows it.",
        10,
    ),
    Step(
        "amsterdam",
        "The tunnel of amsterdam is deleted behind a kill switch: nothing leaks, and no report gets out.",
        lambda home: home.delete_tunnel(),
        "is silent",
        f"Silent {3 * INTERVAL + 1} s after the last report, when three are missing; the server cannot know more yet.",
        30,
        "(it was down)",
    ),
    Step(
        "newyork",
        "The provider of newyork moves its exit to Canada; the policy says US.",
        lambda home: home.move_exit(country="other"),
        "is degraded",
        "Two sources must agree on the country, and it must last: degraded, never a leak.",
        45,
    ),
    Step(
        "zurich",
        "The resolver of zurich is asked outside the tunnel; all other traffic stays inside.",
        lambda home: home.resolver_outside(),
        "is LEAKING",
        "Judged by the path of the queries, not by a country.",
        30,
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="walk through the faults once, then end")
    parser.add_argument("--fast", action="store_true", help="do not pause for a person to look")
    parser.add_argument("--relay", nargs=2, type=int, metavar=("FD", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.relay:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(relay(*arguments.relay))
        return 0
    if os.geteuid() != 0:
        print("demo: it makes network namespaces, so it needs root: sudo make demo", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's background job would ignore Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        demo(once=arguments.once, pause=0.0 if arguments.fast else 5.0)
    except KeyboardInterrupt:
        print("\nTaking the lab down.")
        return 130 if arguments.once else 0
    except (TimeoutError, RuntimeError) as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1
    return 0


def demo(*, once: bool, pause: float) -> None:
    """Raises TimeoutError when something that the narration promises does not happen."""
    started = time.monotonic()
    print("Bringing up the lab: three homes, three VPN providers, an internet between them.", flush=True)
    with Lab(SITES) as lab:
        print(f"The lab is up after {time.monotonic() - started:.1f} s.\n", flush=True)
        for home in lab.homes.values():
            switch = "kill switch" if home.site.kill_switch else "no kill switch"
            kind = {"wireguard": "WireGuard", "openvpn": "OpenVPN"}[str(home.site.vpn)]
            print(f"  {home.name:<10} {kind:<10} {switch:<15} home {home.home4:<13} exit {home.exit4}")
        print(flush=True)
        key = secrets.token_urlsafe(24)
        start_server(lab, key)
        with Messages(lab) as messages, dashboard(lab.srv) as port:
            print(f"Dashboard: http://localhost:{port}\n", flush=True)
            for home in lab.homes.values():
                start_agent(lab, home, key)
            for home in lab.homes.values():
                messages.wait(0, (home.name, "protected"), 30)
            print(f"\nAll three are protected. Agents report every {INTERVAL} s here (30 s by default).\n", flush=True)
            time.sleep(pause)
            for number, step in enumerate(STEPS, start=1):
                walk(lab, messages, number, step, pause)
            if once:
                return
            print(f"The lab stays up: http://localhost:{port}    Ctrl-C ends it.", flush=True)
            threading.Event().wait()


def walk(lab: Lab, messages: Messages, number: int, step: Step, pause: float) -> None:
    home, before = lab.site(step.site), messages.count
    print(f"{number}. {step.say}\n   {step.expect}", flush=True)
    began = time.time()
    step.fault(home)
    told = messages.wait(before, (step.site, step.told), step.limit)
    print(f"   Told {float(told['time']) - began:.1f} s after the fault.", flush=True)
    time.sleep(pause)
    before = messages.count
    print("   Healing it.", flush=True)
    home.heal()
    messages.wait(before, (step.site, step.recovered), 60)
    print(flush=True)
    time.sleep(pause)


def start_server(lab: Lab, key: str) -> None:
    settings = {
        "VPN_SENTINEL_API_KEY": key,
        "VPN_SENTINEL_DATA_DIR": str(lab.dir / "server"),
        "VPN_SENTINEL_SERVER_API_PORT": str(API_PORT),
        "VPN_SENTINEL_SERVER_HEALTH_PORT": str(HEALTH_PORT),
        "VPN_SENTINEL_SERVER_DASHBOARD_PORT": str(DASHBOARD_PORT),
        "VPN_SENTINEL_TLS_CERT_PATH": str(lab.server_cert.cert),
        "VPN_SENTINEL_TLS_KEY_PATH": str(lab.server_cert.key),
        "VPN_SENTINEL_CA_FILE": str(lab.ca_file),
        "VPN_SENTINEL_GRACE_DEGRADED": str(GRACE_DEGRADED),
        "TELEGRAM_BOT_TOKEN": "123456:lab-token",
        "TELEGRAM_CHAT_ID": str(CHAT),
    }
    server = lab.srv.spawn([sys.executable, "-m", "vpn_sentinel", "server"], env=settings, log="server")
    try:
        lab.srv.wait_port(API_PORT, 20)
        lab.srv.wait_port(DASHBOARD_PORT, 20)
    except TimeoutError:
        raise RuntimeError(f"the server did not start:\n{server.output()}") from None


def start_agent(lab: Lab, home: Home, key: str) -> None:
    settings = {
        "VPN_SENTINEL_URL": f"https://{lab.server_name}:{API_PORT}",
        "VPN_SENTINEL_CA_FILE": str(lab.ca_file),
        "VPN_SENTINEL_API_KEY": key,
        "VPN_SENTINEL_CLIENT_ID": home.name,
        "VPN_SENTINEL_INTERVAL": str(INTERVAL),
        "VPN_SENTINEL_DATA_DIR": str(lab.dir / f"agent-{home.name}"),
        "VPN_SENTINEL_HOME_NETWORKS": ",".join(home.home_networks),
        "VPN_SENTINEL_EXPECTED_COUNTRIES": COUNTRY[home.name],
        "VPN_SENTINEL_GEO_DB": str(lab.mmdb),
    }
    home.spawn([sys.executable, "-m", "vpn_sentinel", "agent"], env=settings, log="agent")


# --- the dashboard, from this machine's browser ---


@contextlib.contextmanager
def dashboard(node: Node) -> Iterator[int]:
    """Make the node's dashboard reachable on this machine's loopback; yields the port.

    A socket stays in the namespace where it was made: the listening one is made here and handed to a process that
    lives in the node, so what it accepts comes from here and what it connects to is there.
    """
    listening = _listen(DASHBOARD_PORT)
    port = int(listening.getsockname()[1])
    if port != DASHBOARD_PORT:
        print(f"Port {DASHBOARD_PORT} is taken on this machine; using {port}.")
    number = listening.fileno()
    words = [sys.executable, "-m", "lab.demo", "--relay", str(number), str(DASHBOARD_PORT)]
    with listening:
        process = subprocess.Popen(
            node.argv(words, cwd=Path(__file__).resolve().parents[1]),
            env={**node.environment(), **import_path()},
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield port
    finally:
        process.terminate()
        process.wait(5)


def _listen(wanted: int) -> socket.socket:
    """Loopback only: the dashboard asks for no login."""
    for port in (*range(wanted, wanted + 20), 0):
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", port))
    raise RuntimeError("no port is free for the dashboard")


async def relay(number: int, port: int) -> None:
    """Accept on the inherited socket, connect to the node's own loopback, pass bytes both ways. Runs until ended."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            async with asyncio.TaskGroup() as group:
                group.create_task(_pour(reader, far_writer))
                group.create_task(_pour(far_reader, writer))
        writer.close()

    server = await asyncio.start_server(connected, sock=socket.socket(fileno=number))
    async with server:
        await server.serve_forever()


async def _pour(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    sink.close()


if __name__ == "__main__":
    sys.exit(main())
