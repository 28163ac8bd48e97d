"""What the routing tables send past the tunnel, for a round."""

from collections.abc import Callable, Iterable
from ipaddress import ip_network

from vpn_sentinel.agent.net.audit import audit
from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.agent.probes.targets import CLOUDFLARE, OPENDNS
from vpn_sentinel.agent.settings import ProbeSettings
from vpn_sentinel.domain.observation import Routed
from vpn_sentinel.domain.policy import IPAddress


class RouteAudit:
    """Reads the routing tables for a round. A nameserver's host route is judged with the nameserver, not here."""

    def __init__(self, settings: ProbeSettings, meant: Callable[[], Iterable[IPAddress]] = tuple) -> None:
        """`meant` returns hosts that may have a host route: VPN Sentinel's server may run on the VPN's host."""
        self._settings = settings
        self._meant = meant
        self._last: tuple[object, tuple[Routed, ...] | None] | None = None

    def read(self, survey: Survey, servers: Iterable[IPAddress]) -> tuple[Routed, ...] | None:
        """What routes send past the tunnel, None where they cannot be read. `servers` are the VPN's."""
        policy, outside = self._settings.policy, self._settings.meant_outside
        hosts = (*(n.address for n in dns.system_nameservers()), *self._meant())
        may_leave = (*policy.allowed_outside, *policy.allowed_resolvers, *(ip_network(dns.plain(h)) for h in hosts))
        known = tuple(servers)
        # Full tables are slow to walk: the last result holds while the tables, and what may leave, are the same.
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
