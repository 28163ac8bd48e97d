"""The system's own resolver, as programs use it: one fresh name a round by getaddrinfo(3).

resolv.conf may be empty, and nsswitch.conf may name another source (nss-resolve, or none): only the call itself shows
whether names are found. In the zone of our own server the address of the name is the resolver's egress. Without a zone
`whoami.akamai.net` is looked up as well, which may be cached: an address counts once it was seen for longer than a
cache keeps it. Where the fresh name does not exist, a name that exists is looked up to see whether any is found.
The call blocks for up to half a minute, so it runs in one daemon thread at a time; no round and no stop waits for it.
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

ROUND_SHARE_S: Final = 2.0  # of a round
LOST_AFTER_S: Final = 12.0  # glibc tries a silent nameserver for ten: resolv.conf(5), timeout and attempts
_NSSWITCH: Final = Path("/etc/nsswitch.conf")
_RESOLVED: Final = Path("/run/systemd/resolve/resolv.conf")
_RESOLVED_STUB: Final = ip_address("127.0.0.53")
# Services of nsswitch.conf(5) that only know this host and its files.
_LOCAL_SERVICES: Final = frozenset(
    {"files", "myhostname", "mymachines", "mdns4_minimal", "mdns6_minimal", "mdns_minimal"}
)
# The name does not exist, or has no address: a server answered. musl has no EAI_ADDRFAMILY.
_NO_SUCH: Final = frozenset(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY") if hasattr(socket, name)
)
_NAMES: Final = {getattr(socket, n): n for n in sorted(dir(socket)) if n.startswith("EAI_")}

_WHOAMI: Final = "whoami.akamai.net."
_EXISTING_NAME: Final = "a.root-servers.net."  # exists wherever the public DNS is reachable, and nobody blocks it
_CACHE_LIFETIME_S: Final = 300.0  # the TTL of its records is less
_CACHE_MAY_HOLD_S: Final = 120.0  # without a lookup; then a cache may hold addresses from before
_MAX_ADDRESSES: Final = 8
_AGENT_NAME: Final = re.compile(
    rf"r[0-9a-f]{{16}}\.l\.google\.com|nx-[0-9a-f]{{16}}\..+|[0-9a-f]{{{canary.LABEL_LENGTH}}}\..+"
)

# Looks a name up and returns its addresses; raises OSError as getaddrinfo(3) fails.
Lookup = Callable[[str], Iterable[IPAddress]]


def _getaddrinfo(name: str) -> tuple[IPAddress, ...]:
    with AS_USER:
        found = socket.getaddrinfo(encoded(name), None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
    known = next((canonical for *_, canonical, _ in found if canonical), name)
    if known.rstrip(".").lower() != name.rstrip(".").lower():
        return ()  # an alias leads to a page that says that the name is blocked
    return tuple(a for *_, at in found if (a := address_in(str(at[0]).partition("%")[0])))


def is_agent_name(name: str) -> bool:
    """Whether an agent generated this DNS name, so that it is not a query of a user's program."""
    return _AGENT_NAME.fullmatch(name.lower().rstrip(".")) is not None


class UncachedAddresses:
    """Finds addresses that cannot be cached from before the network changed. No I/O, no clock."""

    def __init__(self) -> None:
        self._tunnel_and_exit: object = None
        self._looked = 0.0
        self._since: dict[IPAddress, float] = {}

    def of(self, found: Iterable[IPAddress], tunnel_and_exit: object, now: float) -> tuple[IPAddress, ...]:
        """Those of `found` that the name already had more than five minutes ago.

        `tunnel_and_exit` identifies the tunnel and its exit: with another value, the history is dropped.
        """
        if tunnel_and_exit != self._tunnel_and_exit or now - self._looked > _CACHE_MAY_HOLD_S:
            self._since = {}
        self._tunnel_and_exit, self._looked = tunnel_and_exit, now
        self._since = {a: self._since.get(a, now) for a in (*self._since, *found)}
        return tuple(a for a in found if now - self._since[a] > _CACHE_LIFETIME_S)


def fresh_names(zone: dns.CanaryZone | None) -> tuple[str, str]:
    """Two names that were never looked up before. One answer is enough: either may be blocked, or its servers down.

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
        lost_after: float = LOST_AFTER_S,
        nsswitch: Path = _NSSWITCH,
        resolved: Path = _RESOLVED,
    ) -> None:
        self._lookup = lookup
        self._patience, self._lost_after, self._boottime = patience, lost_after, boottime
        self._nsswitch, self._resolved = nsswitch, resolved
        self._uncached = UncachedAddresses()
        self._running: asyncio.Future[SystemLookup] | None = None
        self._since = 0.0
        self._left = False  # a round ended without waiting for it

    async def ask(
        self, zone: dns.CanaryZone | None, servers: Sequence[dns.Nameserver], tunnel_and_exit: object = None
    ) -> SystemLookup | None:
        """Look up a fresh name; None while there is no answer. Takes `patience` seconds at most.

        `tunnel_and_exit` is any value that differs when the tunnel or its exit does.
        """
        if AS_USER.refused:
            return None
        running = self._running
        # An answer that came after the round is outdated: the nameserver may be another one by now.
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
            found = self._outcome(fresh_names(zone), upstreams, shows_egress=zone is not None)
            if zone is None and found.answer is Answer.ANSWERED:
                found = replace(found, egress=self._uncached.of(self._whoami(), tunnel_and_exit, self._boottime()))
            try:
                loop.call_soon_threadsafe(finish, found)
            except RuntimeError:  # the loop has been closed meanwhile
                return

        threading.Thread(target=work, name="system-resolver", daemon=True).start()
        return future

    def _whoami(self) -> tuple[IPAddress, ...]:
        try:
            return _public(self._lookup(_WHOAMI))
        except (OSError, ValueError):
            return ()  # blocked, or its servers are down: unknown, but not an error

    def _outcome(self, names: Sequence[str], upstreams: tuple[IPAddress, ...], *, shows_egress: bool) -> SystemLookup:
        """`shows_egress`: the address of the first name is the resolver's egress."""
        error = ""
        for name in names:
            try:
                found = self._lookup(name)
            except socket.gaierror as e:
                # Some NSS modules, such as mdns4_minimal, report the same when they cannot open a socket.
                if e.errno not in _NO_SUCH or out_of_descriptors():
                    error = f"{_NAMES.get(e.errno, e.errno)}: {e.strerror}"
                    continue
                found = ()
                if only_local(self._nsswitch):
                    return SystemLookup(answer=Answer.UNREACHABLE, error="nsswitch.conf names no DNS for hosts")
                if not self._finds_anything():
                    error = f"not even {_EXISTING_NAME.rstrip('.')} is found"
                    return SystemLookup(answer=Answer.UNREACHABLE, error=error, upstreams=upstreams)
            except (OSError, ValueError) as e:
                error = str(e)
                continue
            egress = _public(found) if shows_egress and name == names[0] else ()
            return SystemLookup(answer=Answer.ANSWERED, egress=egress, upstreams=upstreams)
        answer = Answer.UNKNOWN if out_of_descriptors() else Answer.UNREACHABLE
        return SystemLookup(answer=answer, error=error[:200], upstreams=upstreams)

    def _finds_anything(self) -> bool:
        """False where a server denies a name that exists, such as a resolver without access to the internet."""
        try:
            self._lookup(_EXISTING_NAME)
        except socket.gaierror as e:
            return e.errno not in _NO_SUCH
        except (OSError, ValueError):
            return True
        return True

    def _upstreams(self, servers: Sequence[dns.Nameserver]) -> tuple[IPAddress, ...]:
        """The nameservers of systemd-resolved, from the resolv.conf that it writes next to the one for its stub."""
        if all(s.address != _RESOLVED_STUB for s in servers) or not self._resolved.exists():
            return ()
        return tuple(dns.plain(s.address) for s in dns.system_nameservers(self._resolved))


def _public(found: Iterable[IPAddress]) -> tuple[IPAddress, ...]:
    """The addresses that can be a resolver's; IPv6 only without IPv4, since DNS64 (RFC 6147) may have derived it."""
    known = tuple(dict.fromkeys(a for a in map(dns.on_the_internet, found) if a is not None))[:_MAX_ADDRESSES]
    return tuple(a for a in known if a.version == 4) or known


def only_local(nsswitch: Path) -> bool:
    """Whether the hosts line of nsswitch.conf(5) has only local services. musl does not read that file."""
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
