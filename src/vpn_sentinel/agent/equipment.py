"""What a round needs, made from the settings: for the agent, and for `check`, which has no spool and no uplink."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_network

from vpn_sentinel.agent.asides import Portal
from vpn_sentinel.agent.endpoints import TCP
from vpn_sentinel.agent.geo.databases import Databases
from vpn_sentinel.agent.http import Client, split, tls_context
from vpn_sentinel.agent.interfaces import Paths, Survey
from vpn_sentinel.agent.leakwatch.senders import Senders, senders
from vpn_sentinel.agent.names import Names
from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.audit import audit
from vpn_sentinel.agent.netlink import Netlink
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.agent.probes.canary import Flock, OverTcp
from vpn_sentinel.agent.probes.gateway import gateway
from vpn_sentinel.agent.probes.placing import Service, services
from vpn_sentinel.agent.probes.portal import portal
from vpn_sentinel.agent.probes.targets import CLOUDFLARE, OPENDNS, Target, address_in
from vpn_sentinel.agent.probes.trace import LIMIT as TRACE_LIMIT
from vpn_sentinel.agent.probes.trace import TRACE_URL, TRACE_URL_6, trace
from vpn_sentinel.agent.settings import ProbeSettings
from vpn_sentinel.domain.observation import Canary, Path, Routed
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError

log = logging.getLogger(__name__)

# Seconds of silence, and those of a round then: together longer than the grace of a dead tunnel.
_SILENT, _HURRY = 0.7, 1.1


def open_kernel() -> Netlink | None:
    try:
        return Netlink()
    except OSError as e:
        log.warning("no netlink here: interfaces and paths stay unknown", extra={"reason": e.strerror})
        return None


def http_client(settings: ProbeSettings, names: Names) -> Client:
    """Raises SettingError when the CA file holds no certificates."""
    try:
        return Client(names=names, tls=tls_context(settings.ca_file))
    except OSError as e:
        raise SettingError("VPN_SENTINEL_CA_FILE", f"{settings.ca_file} holds no usable certificates") from e


def chosen_services(settings: ProbeSettings) -> tuple[Service, ...]:
    """All, or the one that is configured; Cloudflare's trace is asked for the exit in any case."""
    found = services(settings.ipinfo_url, settings.ipapi_url, settings.ipwhois_url, settings.trace_url)
    chosen = settings.geolocation_service
    return found if chosen == "auto" else tuple(s for s in found if s.name in (chosen, "cloudflare"))


def open_databases(settings: ProbeSettings, clock: Clock) -> Databases:
    """Those that are named, else those that `geo update` installed. Raises SettingError."""
    try:
        return Databases(clock, files=settings.databases, folder=settings.geo_folder)
    except ValueError as e:
        raise SettingError("VPN_SENTINEL_GEO_DB", str(e)) from e


def flock(
    settings: ProbeSettings,
    http: Client,
    echoes: tuple[Target, ...],
    paths: Paths,
    *,
    silent_for: float = 0.0,
    pulsed: bool = False,
) -> Flock:
    """Who is asked in a round: the server's echo and Cloudflare, then OpenDNS, then Cloudflare over HTTPS.

    The last of them is for networks that let no datagram through. Where pulses have had replies until now (`pulsed`),
    or went unanswered for most of a second, `silent_for`, it is not waited for so long.
    """
    if AS_USER.refused:
        return Flock(targets=(), reserve=())  # what is asked from here shows the way of others, who are meant to go out
    patience = _HURRY if pulsed or silent_for >= _SILENT else TRACE_LIMIT
    # A nameserver in use is judged as one: what escapes to it is a DNS leak, and says nothing of other traffic.
    nameservers = {server.address for server in dns.system_nameservers()}
    usual, reserve = (tuple(t for t in some if t.address not in nameservers) for some in (CLOUDFLARE, OPENDNS))
    if len(usual) < len(CLOUDFLARE):
        usual, reserve = (*usual, *reserve), ()
    return Flock(
        targets=(*echoes, *usual),
        reserve=reserve,
        others=tuple(_over_https(url, http, paths, patience) for url in _traces(settings.trace_url)),
        marked=marks_lead_out(paths.survey),
        gateway=gateway(paths, (n.address for n in dns.system_nameservers())),
        may_leave=settings.policy.allows_outside,
    )


def marks_lead_out(survey: Survey) -> bool:
    """Whether a rule takes what has a mark past the tunnel: a VPN program's packets, or whatever a firewall marks."""
    fib, device = survey.fib, survey.device()
    if fib is None or device is None:
        return False
    found = senders(fib, device.index, Senders()).excepted
    return any(rule.mark for rule in found if not any(r.invert and r.mark == rule.mark for r in fib.rules))


def _traces(url: str) -> tuple[str, ...]:
    """The trace service, and its IPv6 address where it is Cloudflare's."""
    return (url, TRACE_URL_6) if url == TRACE_URL else (url,)


def _over_https(url: str, http: Client, paths: Paths, patience: float) -> OverTcp:
    where, path = split(url), path_to(url, paths)
    address = address_in(where.host)
    family = address.version if address is not None else 4

    async def ask() -> Canary:
        # Another tunnel may have come up meanwhile, and carried the answer.
        found = await trace(http, url, path, patience, family)
        return found if path_to(url, paths) is path else replace(found, path=Path.UNKNOWN)

    return OverTcp(
        ask=ask,
        address=address,
        port=where.port,
        path=path,
        family=family,
    )


class RouteAudit:
    """How a round reads the routing tables. A nameserver's own route is judged as the nameserver's way is."""

    def __init__(self, settings: ProbeSettings, meant: Callable[[], Iterable[IPAddress]] = tuple) -> None:
        """`meant` are hosts that may have a route of their own: our server may run on the VPN's."""
        self._settings = settings
        self._meant = meant
        self._last: tuple[object, tuple[Routed, ...] | None] | None = None

    def look(self, survey: Survey, servers: Iterable[IPAddress]) -> tuple[Routed, ...] | None:
        """What routes send past the tunnel, None where they cannot be read. `servers` are the VPN's."""
        policy, outside = self._settings.policy, self._settings.meant_outside
        hosts = (*(n.address for n in dns.system_nameservers()), *self._meant())
        may_leave = (*policy.allowed_outside, *policy.allowed_resolvers, *(ip_network(dns.plain(h)) for h in hosts))
        known = tuple(servers)
        # Walking full tables takes a while: the last answer holds while they, and what may leave, are the same.
        devices = tuple(i.index for i in survey.beside)
        now = (survey.fib, survey.user, survey.tunnel, survey.natted, devices, may_leave, known)
        if self._last is None or self._last[0] != now:
            found = audit(
                survey,
                may_leave=may_leave,
                servers=known,
                services=[t.address for t in (*CLOUDFLARE, *OPENDNS)],
                interfaces=outside.interfaces,
                is_meant=outside.covers,
            )
            self._last = now, found
        return self._last[1]


def portal_beside(settings: ProbeSettings, names: Names) -> Portal:
    """How a round looks for a captive portal: at the trace service's host, without TLS."""
    host = split(settings.trace_url).host

    async def ask(device: str) -> bool | None:
        address = next(iter(names.known(host)), None)
        return None if address is None else await portal(address, host, device)

    return ask


def path_to(url: str, paths: Paths) -> Path:
    """How the kernel would route a request to `url`; unknown for a name, whose address is not known yet."""
    where = split(url)
    address = address_in(where.host)
    return Path.UNKNOWN if address is None else paths.of(address, where.port, TCP)
