"""What the rules are made from: the tunnel and its server, the LAN, this project's server, the owner's policy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path as File
from typing import Final

from vpn_sentinel.agent.containment.containment import ContainmentFacts
from vpn_sentinel.agent.containment.exempt import Exemptions
from vpn_sentinel.agent.containment.proof import Cause
from vpn_sentinel.agent.containment.rules import AllowedTraffic
from vpn_sentinel.agent.leakwatch.egress_map import EgressMap, Tables, egress_map
from vpn_sentinel.agent.leakwatch.meant import MeantOutside
from vpn_sentinel.agent.leakwatch.senders import is_mark
from vpn_sentinel.agent.net.endpoints import PROTOCOLS, TCP, UDP, Endpoint, parse_endpoint
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.kernel import Kernel
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.net.sockets import listening_ports
from vpn_sentinel.agent.net.urls import split
from vpn_sentinel.domain.observation import Path
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy, is_public

_ENDPOINTS_FACT: Final = "containment.endpoints"
_HOSTS_FACT: Final = "containment.hosts"
_FORWARDING: Final = (File("/proc/sys/net/ipv4/ip_forward"), File("/proc/sys/net/ipv6/conf/all/forwarding"))


@dataclass(slots=True, kw_only=True)
class Surroundings:
    """`endpoints` returns the tunnel's own, as far as they are known now; `urls` are the server's."""

    kernel: Kernel | None
    tables: Tables | None
    survey: Callable[[], Survey]
    endpoints: Callable[[], tuple[Endpoint, ...]]
    facts: ContainmentFacts
    names: HostResolver
    urls: tuple[str, ...]
    policy: Policy
    meant: MeantOutside = field(default_factory=MeantOutside)
    listening: Callable[[], frozenset[int]] = listening_ports
    _egress: EgressMap = field(default_factory=EgressMap)

    def remember(self) -> Survey:
        """Survey, and keep what leads to the VPN's server, which cannot be read once the tunnel is gone.

        Raises OSError.
        """
        found = self.survey()
        self._egress = egress_map(
            found,
            self.tables,
            allowed=self.policy.allowed_outside,
            resolvers=self.policy.allowed_resolvers,
            before=self._egress,
        )
        if endpoints := self.endpoints():
            self.facts.keep(_ENDPOINTS_FACT, ",".join(str(e) for e in endpoints))
        if self._egress.openvpn and self._egress.hosts:
            self.facts.keep(_HOSTS_FACT, ",".join(str(h) for h in self._egress.hosts))
        return found

    def allowed(self, cause: Cause) -> AllowedTraffic | None:
        """What may pass now, None when no tunnel is known. Raises OSError."""
        found = self.remember()
        if found.tunnel is None:
            return None
        endpoints = self.endpoints() or tuple(parse_endpoint(e) for e in self._facts_list(_ENDPOINTS_FACT))
        servers = [(w, a) for w in map(split, self.urls) for a in self.names.known(w.host)]
        rules = self._egress.with_endpoints(endpoints, (a for _, a in servers))
        # OpenVPN without a management socket: its server is one of the hosts that had a host route.
        hosts: tuple[IPNetwork, ...] = ()
        if not endpoints and not rules.marks:
            hosts = tuple(ip_network(h) for h in self._facts_list(_HOSTS_FACT))
        return AllowedTraffic(
            tunnel=found.tunnel,
            endpoints=endpoints,
            marks=rules.marks,
            services=tuple(Endpoint(a, w.port, TCP) for w, a in servers if not is_public(a)),
            lan=tuple(dict.fromkeys((*rules.outside, *rules.lan, *hosts))),
            resolvers=self.policy.allowed_resolvers,
            leaking_names=tuple(sorted((a for a in cause.nameservers if a.is_loopback), key=str)),
            exempt=Exemptions(
                meant=self.meant,
                excepted=tuple(r for r in self._egress.senders.excepted if not is_mark(r)),
                listening=self.listening(),
            ),
            forwards=any(_is_on(file) for file in _FORWARDING),
        )

    def path_of(self, address: IPAddress, port: int, protocol: str) -> Path:
        return Paths(self.kernel, self.survey()).of(address, port, PROTOCOLS.get(protocol, UDP))

    def _facts_list(self, name: str) -> list[str]:
        return [word for word in (self.facts.fact(name) or "").split(",") if word]


def _is_on(file: File) -> bool:
    try:
        return file.read_bytes().strip() == b"1"
    except OSError:  # a kernel without IPv6
        return False
