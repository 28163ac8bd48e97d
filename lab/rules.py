"""nftables rules as a pure function of what each home's line looks like right now.

No fault edits rules. A fault changes a home's `Line`; the rules of every node it touches are rendered anew and replaced
in one transaction. That makes faults idempotent and independent of order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lab.plan import ISP_RESOLVER, KINDS, NEXT_SERVER, REWRITER, STANDBY, HomePlan, Kind, Provider

DOCKER = "172.17.0"
"""Docker's usual network, without the last octet: the host is .2 there, and .1 is its gateway."""


@dataclass
class Line:
    """The wanted condition of one home, its tunnel and its path through the ISP and the provider."""

    plan: HomePlan
    provider: Provider | None
    vpn: str | None
    ipv6: str  # tunnel, outside, dropped, none
    kill_switch: bool = False
    kill_switch_lan: bool = False
    kill_switch_udp_only: bool = False
    home4: str = ""
    device: str | None = None  # the tunnel's device, where it is not called as usual
    uplink: str = "lan"
    cgnat: bool = False
    # The tunnel's client
    tunnel: str = "up"  # up, link_down, deleted, killed
    next_server: bool = False
    standby: Provider | None = None  # of a second WireGuard
    standby_tunnel: str = "up"  # up, deleted
    peer_admitted: bool = True
    orphaned: bool = False
    # Routes and resolvers of the host
    outside: frozenset[str] = frozenset()
    routed: frozenset[str] = frozenset()  # by a route of main, not by a rule
    published: frozenset[int] = frozenset()
    marked: bool = False
    firewalled: str = ""  # what the host's firewall marks, for a rule to lead past the tunnel
    ruled: frozenset[str] = frozenset()  # further routing rules
    dscp: int | None = None  # what a rule by DSCP leads past the tunnel
    by_object: str = ""  # the prefix whose route names a nexthop object, which leads into the tunnel
    object_turned: bool = False  # it leads past the tunnel
    networks: int = 0  # of containers
    leased: str | None = None  # a second address of eth0, with its prefix length
    balanced: bool = False
    no_ipv4: bool = False
    vpn_uid: int | None = None
    resolvers: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()  # what the host's own forwarder answers itself, as dnsmasq's --address says it
    names_denied: bool = False  # it denies every name
    # The home router
    wan_down: bool = False
    portal: bool = False
    forwarder: bool = False
    transparent_proxy: bool = False
    rate_kbit: int = 0
    # The ISP
    endpoint_blocked: bool = False
    half_open: bool = False
    mtu: int = 0
    loss: int = 0
    # The provider
    forwarding: bool = True
    exit: str = "first"
    dropped: frozenset[str] = frozenset()
    resolver_stopped: bool = False
    dns_intercepted: bool = False
    dns_rewritten: bool = False
    resolver_elsewhere: bool = False
    refused_names: frozenset[str] = frozenset()
    ports: dict[int, bool] = field(default_factory=dict)  # forwarded port -> open

    @property
    def kind(self) -> Kind:
        assert self.vpn is not None
        return KINDS[self.vpn]

    @property
    def interface(self) -> str | None:
        """The device that carries the host's traffic."""
        return None if self.vpn is None else self.device or self.kind.interface

    @property
    def endpoint(self) -> str:
        """The address that the tunnel's packets go to on the home's line."""
        assert self.provider is not None
        return self.provider.server(NEXT_SERVER if self.next_server else self.kind.server)

    @property
    def line4(self) -> str:
        """What the home's packets come from on its line: the public address, or one behind a carrier's NAT."""
        return f"{self.plan.carrier4}.20" if self.cgnat else self.home4

    @property
    def inner(self) -> tuple[str, str]:
        """The tunnel's addresses."""
        assert self.provider is not None
        assert self.vpn is not None
        return (
            self.provider.inner4(self.vpn, self.plan.client),
            self.provider.inner6(self.vpn, self.plan.client),
        )

    def guest_of(self, provider: Provider) -> Line | None:
        """This home as a provider sees it: by its tunnel, by the one that stands by, or not at all."""
        if provider == self.standby:
            return Line(plan=self.plan, provider=provider, vpn="wireguard", ipv6=self.ipv6, home4=self.home4)
        return self if provider == self.provider else None

    @property
    def exits(self) -> tuple[str, str]:
        assert self.provider is not None
        return self.provider.exits(self.plan.client)[self.exit]


MARK = 7
_WIREGUARD = KINDS["wireguard"].outer


def _chain(name: str, hook: str, rules: Iterable[str], policy: str = "accept", kind: str = "filter") -> str:
    priority = {"prerouting": "dstnat", "postrouting": "srcnat"}[hook] if kind == "nat" else "filter"
    body = "".join(f"    {rule}\n" for rule in rules)
    return f"  chain {name} {{\n    type {kind} hook {hook} priority {priority}; policy {policy};\n{body}  }}"


def host(line: Line) -> str:
    """The client's own firewall: the kill switch, what drops IPv6, and what marks packets."""
    return _marking(line) + _output(line)


def _marking(line: Line) -> str:
    if not line.firewalled:
        return ""
    mark = "  chain marking {\n    type route hook output priority mangle;\n"
    mark += f"    {line.firewalled} meta mark set {MARK}\n  }}\n"
    return mark + _chain("leading", "postrouting", [f"meta mark {MARK} masquerade"], kind="nat") + "\n"


def _output(line: Line) -> str:
    rules = []
    if line.ipv6 == "dropped":
        rules += ['oifname "eth0" ip6 daddr 2000::/3 drop']
    if not line.kill_switch or line.provider is None or line.vpn is None:
        return _chain("output", "output", rules)
    if line.kill_switch_udp_only:
        rules += ["meta l4proto != udp accept"]
    if line.uplink == "two":
        rules += ['oifname "eth1" accept']  # a kill switch that knows the first network only
    rules += [
        f'oifname {{ "lo", "{line.interface}" }} accept',
        *(f"ip daddr {line.endpoint} {protocol} dport {port} accept" for protocol, port in line.kind.outer),
        "ct state established,related accept",
        "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit } accept",
    ]
    if line.standby is not None:
        there = f"ip daddr {line.standby.endpoint}"
        rules += [f'oifname "{STANDBY}" accept', *(f"{there} {p} dport {port} accept" for p, port in _WIREGUARD)]
    if line.kind.through is not None:
        device, server, protocol, port = line.kind.through
        inner = f"ip daddr {line.provider.server(server)} {protocol} dport {port}"
        rules += [f'oifname "{device}" {inner} accept']
    if line.kill_switch_lan:
        rules += [f"ip daddr {line.plan.lan4}.0/24 accept", f"ip6 daddr {{ fe80::/10, {line.plan.lan6}:/64 }} accept"]
    if line.ipv6 == "outside":
        rules += ["meta nfproto ipv6 accept"]  # the classic hole: a kill switch that knows IPv4 only
    return _chain("output", "output", rules, policy="drop")


def router_nat(line: Line) -> str:
    """The home router's NAT: masquerading, the DNS forwarder, the transparent proxy, the captive portal."""
    before = []
    if line.portal:
        before += ['iifname "br0" tcp dport 80 redirect to :8080', 'iifname "br0" tcp dport 443 redirect to :8443']
    if line.forwarder:
        before += [
            f"ip daddr {{ {line.plan.lan4}.1, {DOCKER}.1 }} {proto} dport 53 dnat ip to {ISP_RESOLVER}"
            for proto in ("udp", "tcp")
        ]
    if line.transparent_proxy:
        before += [f'iifname "br0" meta nfproto ipv4 {p} dport 53 dnat ip to {ISP_RESOLVER}' for p in ("udp", "tcp")]
    here = f"{DOCKER}.2" if line.uplink == "docker" else f"{line.plan.lan4}.10"
    before += [f'iifname "wan" tcp dport {port} dnat ip to {here}' for port in sorted(line.published)]
    after = [f'oifname "wan" meta nfproto ipv4 snat ip to {line.line4}']
    return "\n".join(
        [_chain("before", "prerouting", before, kind="nat"), _chain("after", "postrouting", after, kind="nat")]
    )


def router_filter(line: Line) -> str:
    """The home router's forwarding; a captive portal lets nothing but DNS out."""
    rules = ['iifname "br0" oifname "wan" udp dport != 53 drop', 'iifname "br0" oifname "wan" meta l4proto != udp drop']
    return _chain("forward", "forward", rules if line.portal else [])


def isp(lines: Iterable[Line]) -> str:
    """What the ISP does to tunnels on their way."""
    rules = []
    for line in lines:
        if line.provider is None or line.vpn is None:
            continue
        home, endpoint = line.line4, line.endpoint
        there = [f"ip saddr {home} ip daddr {endpoint} {protocol} dport {port}" for protocol, port in line.kind.outer]
        back = [f"ip saddr {endpoint} ip daddr {home} {protocol} sport {port}" for protocol, port in line.kind.outer]
        if line.endpoint_blocked:
            rules += [f"{packets} drop" for packets in there]
        if line.half_open:
            rules += [f"{packets} drop" for packets in back]
        if line.mtu:
            # Fragments carry no port: a black hole swallows whole packets and fragments of that size alike.
            rules += [f"ip saddr {home} ip daddr {endpoint} ip length > {line.mtu} drop"]
            rules += [f"ip saddr {endpoint} ip daddr {home} ip length > {line.mtu} drop"]
        if line.loss:
            rules += [f"{packets} numgen random mod 100 < {line.loss} drop" for packets in back]
    return _chain("forward", "forward", rules)


def isp_nat(lines: Iterable[Line]) -> str:
    """The carrier's NAT: homes without a public address of their own."""
    after = [f"ip saddr {line.line4} snat ip to {line.home4}" for line in lines if line.cgnat]
    return _chain("after", "postrouting", after, kind="nat")


def provider_nat(provider: Provider, lines: Iterable[Line]) -> str:
    """Exit addresses by client; forwarded ports; DNS interception inside the tunnel."""
    exits4, exits6, before, after = [], [], [], []
    for line in lines:
        inner4, inner6 = line.inner
        exit4, exit6 = line.exits
        exits4.append(f"{inner4} : {exit4}")
        exits6.append(f"{inner6} : {exit6}")
        if line.dns_intercepted:
            for proto in ("udp", "tcp"):
                before += [f"ip saddr {inner4} {proto} dport 53 dnat ip to {provider.resolver4}"]
        if line.dns_rewritten:
            asked = f"ip saddr {inner4} ip daddr {provider.resolver4}"
            before += [f"{asked} udp dport 53 dnat ip to {provider.resolver4}:{REWRITER}"]
        before += [
            f"ip daddr {exit4} meta l4proto {{ tcp, udp }} th dport {port} dnat ip to {inner4}" for port in line.ports
        ]
        if line.resolver_elsewhere:
            target = provider.resolver_egress_elsewhere
            after += [
                f"ip saddr {provider.resolver_egress} meta l4proto {{ tcp, udp }} th dport 53 snat ip to {target}"
            ]
    after += [
        'oifname "eth0" meta nfproto ipv4 snat ip to ip saddr map @exits4',
        'oifname "eth0" meta nfproto ipv6 snat ip6 to ip6 saddr map @exits6',
    ]
    return "\n".join(
        [
            _map("exits4", "ipv4_addr", exits4),
            _map("exits6", "ipv6_addr", exits6),
            _chain("before", "prerouting", before, kind="nat"),
            _chain("after", "postrouting", sorted(set(after), key=after.index), kind="nat"),
        ]
    )


def _map(name: str, kind: str, elements: list[str]) -> str:
    values = f" elements = {{ {', '.join(elements)} }};" if elements else ""
    return f"  map {name} {{ type {kind} : {kind};{values} }}"


def provider_filter(lines: Iterable[Line]) -> str:
    """What the provider forwards for each client, and whether its resolver answers."""
    forward: list[str] = []
    inputs: list[str] = []
    for line in lines:
        inner4, inner6 = line.inner
        if not line.forwarding:
            forward += [f"ip saddr {inner4} drop", f"ip daddr {inner4} drop"]
            forward += [f"ip6 saddr {inner6} drop", f"ip6 daddr {inner6} drop"]
        for address in sorted(line.dropped):
            family, inner = ("ip6", inner6) if ":" in address else ("ip", inner4)
            forward += [f"{family} saddr {inner} {family} daddr {address} drop"]
        if line.resolver_stopped:
            # What a host without the daemon does: port unreachable, connection refused.
            for chain in (forward, inputs):
                for family, inner in (("ip", inner4), ("ip6", inner6)):
                    chain += [f"{family} saddr {inner} udp dport 53 reject"]
                    chain += [f"{family} saddr {inner} tcp dport 53 reject with tcp reset"]
        for port, is_open in line.ports.items():
            if not is_open:
                forward += [f'iifname "eth0" ip daddr {inner4} meta l4proto {{ tcp, udp }} th dport {port} drop']
    return "\n".join([_chain("forward", "forward", forward), _chain("input", "input", inputs)])
