"""The system's own resolver, as programs use it: one fresh name a round by getaddrinfo(3).

resolv.conf may be empty, nsswitch.conf may ask elsewhere (nss-resolve, nothing at all): only the call itself tells.
In the zone of our own server the name's address is where the resolver asked from. Without a zone `whoami.akamai.net` is
looked up as well, which caches may keep: its answer counts once it is older than those do. Where the fresh name is said
not to be there, one that surely is tells whether any is found.
It blocks for up to half a minute, so it runs in one daemon thread at a time, which neither a round nor a stop awaits.
"""

import asyncio
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.resolver import encoded
from vpn_sentinel.agent.net.urls import address_in
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.domain.observation import Answer, SystemLookup
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.shortage import out_of_descriptors
from vpn_sentinel.wire import canary

ROUND_SHARE_S: Final = 2.0  # seconds of a round
LOST_AFTER: Final = 12.0  # seconds; glibc tries a silent nameserver for ten: resolv.conf(5), timeout and attempts
_NSSWITCH: Final = Path("/etc/nsswitch.conf")
_RESOLVED: Final = Path("/run/systemd/resolve/resolv.conf")
_STUB: Final = ip_address("127.0.0.53")
# Services of nsswitch.conf(5) that know this host and its files alone.
_LOCAL_SERVICES: Final = frozenset(
    {"files", "myhostname", "mymachines", "mdns4_minimal", "mdns6_minimal", "mdns_minimal"}
)
# The name is not there, or has no address: somebody was asked, and answered. musl has no EAI_ADDRFAMILY.
_NO_SUCH: Final = frozenset(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY") if hasattr(socket, name)
)
_NAMES: Final = {getattr(socket, n): n for n in sorted(dir(socket)) if n.startswith("EAI_")}

_WHOAMI: Final = "whoami.akamai.net."
_ALWAYS: Final = "a.root-servers.net."  # found wherever the internet's names are, and nothing that anybody blocks
_CACHED: Final = 300.0  # seconds; its records live for less
_CACHE_MAY_HOLD_S: Final = 120.0  # seconds without a look, after which a cache may hold what was before
_MAX_ADDRESSES: Final = 8  # addresses
_OURS: Final = re.compile(
    rf"r[0-9a-f]{{16}}\.l\.google\.com|nx-[0-9a-f]{{16}}\..+|[0-9a-f]{{{canary.LABEL_LENGTH}}}\..+"
)

# Looks a name up and returns its addresses; raises OSError as getaddrinfo(3) fails.
Lookup = Callable[[str], Iterable[IPAddress]]


def _getaddrinfo(name: str) -> tuple[IPAddress, ...]:
    with AS_USER:
        found = socket.getaddrinfo(encoded(name), None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
    known = next((canonical for *_, canonical, _ in found if canonical), name)
    if known.rstrip(".").lower() != name.rstrip(".").lower():
        return ()  # an alias leads to the page of whoever blocks the name
    return tuple(a for *_, at in found if (a := address_in(str(at[0]).partition("%")[0])))


def is_ours(name: str) -> bool:
    """Whether a DNS name is one that an agent made up, and so nothing that a user's program asked for."""
    return _OURS.fullmatch(name.lower().rstrip(".")) is not None


class Settled:
    """Tells addresses that no cache can have kept from before the network changed. No I/O, and no clock."""

    def __init__(self) -> None:
        self._tunnel_and_exit: object = None
        self._looked = 0.0
        self._since: dict[IPAddress, float] = {}

    def of(self, found: Iterable[IPAddress], tunnel_and_exit: object, now: float) -> tuple[IPAddress, ...]:
        """Those of `found` that the same name had more than five minutes ago already.

        `tunnel_and_exit` is what the tunnel and its exit are: with another one it begins anew.
        """
        if tunnel_and_exit != self._tunnel_and_exit or now - self._looked > _CACHE_MAY_HOLD_S:
            self._since = {}
        self._tunnel_and_exit, self._looked = tunnel_and_exit, now
        self._since = {a: self._since.get(a, now) for a in (*self._since, *found)}
        return tuple(a for a in found if now - self._since[a] > _CACHED)


def fresh_names(zone: dns.CanaryZone | None) -> tuple[str, str]:
    """Two names that nobody asked before, of which one answer will do: either may be blocked, or its servers down.

    They end in a dot, so that no search domain is tried.
    """
    first = zone.method().domain if zone else f"r{secrets.token_hex(8)}.l.google.com"
    return f"{first}.", f"nx-{secrets.token_hex(8)}.nx{secrets.token_hex(8)}."


class SystemResolver:
    """`boottime` is the clock's; `nsswitch` and `resolved` are read when they matter."""

    def __init__(
        self,
        lookup: Lookup = _getaddrinfo,
        *,
        boottime: Callable[[], float],
        patience: float = ROUND_SHARE_S,
        lost_after: float = LOST_AFTER,
        nsswitch: Path = _NSSWITCH,
        resolved: Path = _RESOLVED,
    ) -> None:
        self._lookup = lookup
        self._patience, self._lost_after, self._boottime = patience, lost_after, boottime
        self._nsswitch, self._resolved = nsswitch, resolved
        self._settled = Settled()
        self._running: asyncio.Future[SystemLookup] | None = None
        self._since = 0.0
        self._left = False  # a round that had seen enough went on without it

    async def ask(
        self, zone: dns.CanaryZone | None, servers: Sequence[dns.Nameserver], tunnel_and_exit: object = None
    ) -> SystemLookup | None:
        """Look a fresh name up; None while there is no answer yet. At most `patience` seconds.

        `tunnel_and_exit` is anything that differs when the tunnel or its exit is another one.
        """
        if AS_USER.refused:
            return None
        running = self._running
        # What came after a round had gone on is of then: another nameserver may be asked by now.
        if running is None or (self._left and running.done()):
            running = self._running = self._start(zone, self._upstreams(servers), tunnel_and_exit)
            self._since = self._boottime()
        self._left = True
        await asyncio.wait([running], timeout=self._patience)
        self._left = False
        if running.done():
            self._running = None
            return running.result()
        waited = self._boottime() - self._since
        if waited < self._lost_after:
            return None
        return SystemLookup(answer=Answer.LOST, error=f"no answer for {waited:.0f} s")

    def _start(
        self, zone: dns.CanaryZone | None, upstreams: tuple[IPAddress, ...], tunnel_and_exit: object
    ) -> asyncio.Future[SystemLookup]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[SystemLookup] = loop.create_future()

        def finish(found: SystemLookup) -> None:
            if not future.done():
                future.set_result(found)

        def work() -> None:
            found = self._outcome(fresh_names(zone), upstreams, tells=zone is not None)
            if zone is None and found.answer is Answer.ANSWERED:
                found = replace(found, egress=self._settled.of(self._whoami(), tunnel_and_exit, self._boottime()))
            try:
                loop.call_soon_threadsafe(finish, found)
            except RuntimeError:  # the loop has ended meanwhile
                return

        threading.Thread(target=work, name="system-resolver", daemon=True).start()
        return future

    def _whoami(self) -> tuple[IPAddress, ...]:
        try:
            return _public(self._lookup(_WHOAMI))
        except (OSError, ValueError):
            return ()  # blocked, or its servers are down: nothing is known, and nothing amiss

    def _outcome(self, names: Sequence[str], upstreams: tuple[IPAddress, ...], *, tells: bool) -> SystemLookup:
        """`tells` says that the first of the names has the egress as its address."""
        error = ""
        for name in names:
            try:
                found = self._lookup(name)
            except socket.gaierror as e:
                # Some NSS modules, such as mdns4_minimal, say so as well where no socket can be had.
                if e.errno not in _NO_SUCH or out_of_descriptors():
                    error = f"{_NAMES.get(e.errno, e.errno)}: {e.strerror}"
                    continue
                found = ()
                if only_local(self._nsswitch):
                    return SystemLookup(answer=Answer.UNREACHABLE, error="nsswitch.conf names no DNS for hosts")
                if not self._finds_anything():
                    error = f"not even {_ALWAYS.rstrip('.')} is found"
                    return SystemLookup(answer=Answer.UNREACHABLE, error=error, upstreams=upstreams)
            except (OSError, ValueError) as e:
                error = str(e)
                continue
            egress = _public(found) if tells and name == names[0] else ()
            return SystemLookup(answer=Answer.ANSWERED, egress=egress, upstreams=upstreams)
        answer = Answer.UNKNOWN if out_of_descriptors() else Answer.UNREACHABLE
        return SystemLookup(answer=answer, error=error[:200], upstreams=upstreams)

    def _finds_anything(self) -> bool:
        """False where somebody answers, and denies what is there: a resolver without the internet behind it, say."""
        try:
            self._lookup(_ALWAYS)
        except socket.gaierror as e:
            return e.errno not in _NO_SUCH
        except (OSError, ValueError):
            return True
        return True

    def _upstreams(self, servers: Sequence[dns.Nameserver]) -> tuple[IPAddress, ...]:
        """Whom systemd-resolved asks, as it writes it down beside its stub's file."""
        if all(s.address != _STUB for s in servers) or not self._resolved.exists():
            return ()
        return tuple(dns.plain(s.address) for s in dns.system_nameservers(self._resolved))


def _public(found: Iterable[IPAddress]) -> tuple[IPAddress, ...]:
    """The addresses that can be a resolver's. Beside an IPv4 one, one of IPv6 may be made up of it: DNS64, RFC 6147."""
    known = tuple(dict.fromkeys(a for a in map(dns.on_the_internet, found) if a is not None))[:_MAX_ADDRESSES]
    return tuple(a for a in known if a.version == 4) or known


def only_local(nsswitch: Path) -> bool:
    """Whether the hosts line of nsswitch.conf(5) names nobody who asks the network. musl reads no such file."""
    try:
        lines = nsswitch.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return False
    for line in lines:
        database, colon, services = line.partition("#")[0].partition(":")
        if colon and database.strip() == "hosts":
            named = {w for w in services.split() if w[0].isalnum()}
            return bool(named) and named <= _LOCAL_SERVICES
    return False
