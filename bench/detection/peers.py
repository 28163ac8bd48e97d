"""What people run instead, each as a small program with its real period, watching a site of the lab from inside it."""

import contextlib
import json
import random
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lab.home import Home

Check = Callable[[Home, str], str | None]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """`check` looks once, given the site and its server's address, and returns why it alarms, or None.

    It runs every `period` seconds.

    `bound` is the worst case by design, in words, for one row; it is computed and never measured.
    """

    name: str
    period: float
    check: Check
    bound: Callable[[int], str]


DEAD = frozenset({3, 6, 7, 8, 9})
PING_PATIENCE = 5
HANDSHAKE = 180.0
_LOST = (ConnectionError, subprocess.TimeoutExpired)


def ping(site: Home, _: str) -> str | None:
    """One ping to 1.1.1.1, wherever the routes lead: what most uptime checks and container health checks do."""
    done = site.run(["ping", "-n", "-q", "-c", "1", "-W", str(PING_PATIENCE), "1.1.1.1"])
    return None if done.returncode == 0 else "no answer from 1.1.1.1"


def _ping_bound(row: int) -> str:
    return f"{60 + PING_PATIENCE} s" if row in DEAD else "never: the answer comes, outside the tunnel"


def handshake(site: Home, _: str) -> str | None:
    """`time() - wireguard_latest_handshake_seconds > 180`, as exporters and their alert rules have it.

    Without an interface there is no series, and an expression over no series fires nothing.
    """
    said = site.run(["wg", "show", "wg0", "latest-handshakes"])
    if said.returncode != 0 or not said.stdout.split():
        return None
    age = time.time() - float(said.stdout.split()[-1])
    return f"the last handshake is {age:.0f} s old" if age > HANDSHAKE else None


def _handshake_bound(row: int) -> str:
    if row in (3, 7):  # seen in the lab: wireguard-go shakes hands even while its interface is set down
        return "never: handshakes go on"
    if row in DEAD:
        return f"{HANDSHAKE + 15:.0f} s"
    return "never: no interface, no series" if row == 5 else "never: the tunnel is well"


def keepalive(site: Home, server: str) -> str | None:
    """The replaced system's report: the public address from ipinfo.io, the place that 1.1.1.1 sees, both sent home.

    Its server stands at home and compares the address with its own, and the two countries with each other; an address
    that could not be found out counts as bypassed. A report that does not come through is silence, which it minds after
    15 minutes.
    """
    address = country = place = "unknown"
    with contextlib.suppress(*_LOST, json.JSONDecodeError):
        about = json.loads(site.http("GET", "https://ipinfo.io/json", timeout=10).text)
        address, country = about["ip"], about["country"]
    with contextlib.suppress(*_LOST):
        trace = site.http("GET", "https://1.1.1.1/cdn-cgi/trace", timeout=10).text
        place = dict(line.split("=", 1) for line in trace.splitlines() if "=" in line).get("loc", "unknown")
    try:
        site.http("GET", f"{server}/api/v1/whoami", timeout=10)  # stands for the report: does it come through?
    except _LOST:
        return None
    if address in (site.home4, "unknown"):
        return f"the client's address is {address}: bypassed"
    if "unknown" not in (place, country) and place != country:
        return f"DNS in {place}, exit in {country}: leak"
    return None


def _keepalive_bound(row: int) -> str:
    if row in DEAD:
        return "20 min: silence of 15 min, looked at every 5"
    if row in (5, 27):
        return "300 s"
    return "never: it asks neither the resolver in use nor by IPv6"


PEERS = (
    Peer(name="ping every 60 s", period=60.0, check=ping, bound=_ping_bound),
    Peer(name="handshake older than 180 s", period=15.0, check=handshake, bound=_handshake_bound),
    Peer(name="5-minute keepalive", period=300.0, check=keepalive, bound=_keepalive_bound),
)


class Watch:
    """One peer at one site, in a thread. The fault meets it at a random point of its period."""

    def __init__(self, peer: Peer, site: Home, server: str, rng: random.Random) -> None:
        self.peer, self.site, self._server = peer, site, server
        self.alarm: tuple[float, str] | None = None
        self.looks = 0
        self._error: Exception | None = None
        self.phase = rng.uniform(0, peer.period)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def rehearse(self) -> None:
        """Look once while all is well: a peer that alarms now, or cannot look, is set up wrongly."""
        if why := self.peer.check(self.site, self._server):
            raise RuntimeError(f"{self.peer.name} at {self.site.name}, before any fault: {why}")

    def start(self, fault_at: float) -> None:
        """Go on from here, so that the next look comes `phase` seconds after `fault_at` (seconds since the epoch)."""
        self._next = fault_at + self.phase
        while self._next - self.peer.period > time.time():
            self._next -= self.peer.period
        self._thread.start()

    def _run(self) -> None:
        while self.alarm is None and not self._end.wait(max(0.0, self._next - time.time())):
            try:
                why = self.peer.check(self.site, self._server)
            except Exception as e:  # noqa: BLE001 - told by `stop`; a peer that broke has found nothing out
                self._error = e
                return
            self.looks += 1
            if why:
                self.alarm = (time.time(), why)
            self._next += self.peer.period

    def stop(self) -> None:
        """End it. Raises RuntimeError when it broke on the way, for then its silence says nothing."""
        self._end.set()
        self._thread.join(60)
        if self._error is not None:
            raise RuntimeError(f"{self.peer.name} at {self.site.name} broke: {self._error!r}") from self._error
