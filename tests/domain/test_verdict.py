"""The judge, by a table whose keys are situations."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from vpn_sentinel.domain.judge import agreed_country, judge, with_learned_home
from vpn_sentinel.domain.observation import (
    Answer,
    Canary,
    Claim,
    Escape,
    Link,
    Observation,
    Path,
    Place,
    PortCheck,
    Probe,
    Quality,
    ResolverSighting,
    Routed,
    SystemLookup,
    Trigger,
)
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy
from vpn_sentinel.domain.verdict import HARM, MEANING, Code, Finding, Severity, State, worst

HOME, HOME6 = "91.10.20.30", "2003:e0::30"
EXIT, EXIT6 = "146.70.1.2", "2a0d:5600::2"
ISP_RESOLVER = "91.10.0.53"
STRANGER = "77.77.77.77"
POLICY = Policy(home_networks=(ip_network("91.10.20.0/24"), ip_network("2003:e0::/32")))
UNDECLARED = Policy()

UP = Link(name="wg0", present=True, up=True, rx_bytes=7000, tx_bytes=9000)
BY_WORD = Link(name="eth0", present=True, up=True, declared=True)
SET_DOWN = replace(UP, up=False)
GONE = Link(name="wg0", present=False, up=False)

FAILS = SystemLookup(answer=Answer.UNREACHABLE, error="EAI_AGAIN")
WORKS = SystemLookup(answer=Answer.ANSWERED)


def comes_out(address: str) -> SystemLookup:
    return SystemLookup(answer=Answer.ANSWERED, egress=(ip_address(address),))


BLOCKED, LOST, UNREACHABLE, EXPIRED = Answer.BLOCKED, Answer.LOST, Answer.UNREACHABLE, Answer.EXPIRED


def canary(
    end: str | Answer, path: Path = Path.TUNNEL, probe: Probe = Probe.DEFAULT, target: str = "echo", family: int = 4
) -> Canary:
    """A canary that came back from the address `end`, or ended so; "" came back without showing one."""
    if isinstance(end, Answer):
        return Canary(probe=probe, target=target, family=family, answer=end, path=path)
    address = ip_address(end) if end else None
    family = address.version if address else family
    return Canary(probe=probe, target=target, family=family, answer=Answer.ANSWERED, path=path, address=address)


def saw(
    *ends: str | Answer | Canary,
    link: Link | None = UP,
    path: Path = Path.TUNNEL,
    beside: str | Answer | None = BLOCKED,
    first_hop: Answer | Canary | None = None,
    dns: tuple[ResolverSighting, ...] = (),
    places: tuple[Place, ...] = (),
    trigger: Trigger = Trigger.TIMER,
    interfaces: tuple[str, ...] | None = ("eth0", "wg0"),
    intercepted: bool | None = None,
    reported_from: str | None = None,
) -> Observation:
    """What an agent saw: how the canaries on the default route and beside the tunnel ended, and what else."""
    canaries = [e if isinstance(e, Canary) else canary(e, path) for e in ends]
    if beside is not None:
        canaries.append(canary(beside, Path.OUTSIDE, Probe.PHYSICAL))
    if first_hop is not None:
        hop = first_hop if isinstance(first_hop, Canary) else canary(first_hop, Path.OUTSIDE, Probe.FIRST_HOP)
        canaries.append(hop)
    return Observation(
        trigger=trigger,
        link=link,
        interfaces=interfaces,
        canaries=tuple(canaries),
        resolvers=dns,
        places=places,
        dns_intercepted=intercepted,
        reported_from=ip_address(reported_from) if reported_from else None,
    )


def asked(
    egress: str | None = None,
    server: str = "10.64.0.1",
    path: Path = Path.TUNNEL,
    answer: Answer = Answer.ANSWERED,
    client: str | None = None,
    subnet: str | None = None,
) -> ResolverSighting:
    """One lookup: the nameserver `server` was asked by `path`, and its question came out at `egress`."""
    return ResolverSighting(
        method="akamai",
        nameserver=ip_address(server),
        answer=answer,
        path=path,
        egress=ip_address(egress) if egress else None,
        client=ip_address(client) if client else None,
        subnet=ip_network(subnet) if subnet else None,
    )


def routed(
    interface: str = "eth0",
    *networks: str,
    share: float = 0.4,
    answer: Answer = EXPIRED,
    only: str = "",
    ports: tuple[int, int] | None = None,
    more: int = 0,
    tunnel: bool = True,
) -> tuple[Routed, ...]:
    """What routes send where: a part by the tunnel, and `networks` by another device."""
    found = [ip_network(n) for n in networks]
    family = found[0].version if found else 4
    part = Routed(
        interface=interface, family=family, share=share, networks=tuple(found), answer=answer, only=only, more=more,
        ports=ports,
    )  # fmt: skip
    return (Routed(interface="wg0", family=family, share=1.0 - share), part) if tunnel else (part,)


def place(ip: str, country: str | None = None, source: str = "mmdb", asn: int | None = None) -> Place:
    return Place(ip=ip_address(ip), source=source, country=country, asn=asn)


def keepalive(ip: str | None = None, reported_from: str | None = None) -> Observation:
    """What the replaced system's client told, and where the server saw it come from."""
    ends = [canary(ip, Path.UNKNOWN, target="client")] if ip else []
    return saw(*ends, link=None, beside=None, interfaces=None, trigger=Trigger.KEEPALIVE, reported_from=reported_from)


def escaped(destination: str, port: int | None = 443, name: str | None = None) -> tuple[Escape, ...]:
    """One packet that the leak watch saw leave."""
    where = ip_address(destination)
    source = ip_address("192.168.1.10" if where.version == 4 else HOME6)
    return (
        Escape(interface="eth0", protocol="udp", source=source, destination=where, destination_port=port, name=name),
    )


def pulses(*, lost: int = 0, rtt_ms: float = 20.0, vanished: int | None = None) -> Quality:
    return Quality(seconds=60, sent=30, lost=lost, rtt_ms=rtt_ms, mtu=1300, vanished=vanished)


def pulse(came_from: str, *, unheard: bool | None = None) -> Observation:
    """What the server itself saw of an agent's pulses."""
    return Observation(trigger=Trigger.PULSE, reported_from=ip_address(came_from), unheard=unheard)


NL_ONLY = replace(POLICY, expected_countries=("NL", "SE"))
TWO_SAY_DE = (place(EXIT, "DE"), place(EXIT, "DE", "ipinfo"))
ISP_PLACES = (place(HOME, "DE", asn=3320), place("91.11.0.53", "DE", asn=3320), place(EXIT, "NL", asn=9009))

ONE_NETWORK = ("eth0", "5.9.10.0/24")
CASES: dict[str, tuple[Observation, Policy, State, list[Code]]] = {
    "one of two ways out is open": (
        saw(
            EXIT,
            replace(canary(BLOCKED, Path.OUTSIDE, Probe.PHYSICAL), interface="eth0"),
            replace(canary(HOME, Path.OUTSIDE, Probe.PHYSICAL), interface="eth1"),
            beside=None,
        ),
        POLICY, State.PROTECTED, [Code.KILLSWITCH_OPEN],
    ),
    "routes send a network past the tunnel": (
        replace(saw(EXIT), routed=routed(*ONE_NETWORK)), POLICY, State.LEAKING, [Code.SPLIT_ROUTE],
    ),
    "the same, and nothing that was sent there was refused": (
        replace(saw(EXIT, beside=None), routed=routed(*ONE_NETWORK, answer=LOST)), POLICY, State.LEAKING,
        [Code.SPLIT_ROUTE],
    ),
    "the same, and this host refuses to send there": (
        replace(saw(EXIT), routed=routed(*ONE_NETWORK, answer=BLOCKED)), POLICY, State.PROTECTED, [],
    ),
    "a kill switch holds on that way out, and nothing shows a hole": (
        replace(
            saw(EXIT, replace(canary(BLOCKED, Path.OUTSIDE, Probe.PHYSICAL), interface="eth0")),
            routed=routed(*ONE_NETWORK, answer=LOST),
        ),
        POLICY, State.PROTECTED, [],
    ),
    "a kill switch holds on another way out only": (
        replace(
            saw(EXIT, replace(canary(BLOCKED, Path.OUTSIDE, Probe.PHYSICAL), interface="eth1")),
            routed=routed(*ONE_NETWORK, answer=LOST),
        ),
        POLICY, State.LEAKING, [Code.SPLIT_ROUTE],
    ),
    "routes send DNS past the tunnel, and nothing else": (
        replace(saw(EXIT), routed=routed("eth0", "0.0.0.0/0", only="UDP to port 53")), POLICY, State.LEAKING,
        [Code.DNS_LEAK],
    ),
    "the same for DNS over TLS": (
        replace(saw(EXIT), routed=routed("eth0", "0.0.0.0/0", only="TCP to port 853")), POLICY, State.LEAKING,
        [Code.DNS_LEAK],
    ),
    "DNS of one type of service": (
        replace(saw(EXIT), routed=routed("eth0", "0.0.0.0/0", only="UDP to port 53 with TOS 0x10", ports=(53, 53))),
        POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "DNS by a mask": (
        replace(saw(EXIT), routed=routed("eth0", "0.0.0.0/0", only="UDP to port 53 under mask 0xfffe", ports=(52, 53))),
        POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "DNS and the port after it": (
        replace(saw(EXIT), routed=routed("eth0", "0.0.0.0/0", only="packets to ports 53-54", ports=(53, 54))),
        POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "routes send every port past the tunnel": (
        replace(saw(EXIT), routed=routed("eth0", "0.0.0.0/0", only="UDP to ports 1-65535", ports=(1, 65535))),
        POLICY, State.LEAKING, [Code.SPLIT_ROUTE],
    ),
    "routes send one port past the tunnel": (
        replace(saw(EXIT), routed=routed("eth0", "0.0.0.0/0", only="TCP to port 5353")), POLICY, State.LEAKING,
        [Code.SPLIT_ROUTE],
    ),
    "DNS comes out at home by a rule for its port, and a connection at the VPN's exit": (
        saw(HOME, canary(EXIT, target="trace"), path=Path.OUTSIDE), POLICY, State.LEAKING, [Code.SPLIT_ROUTE],
    ),
    "routes past the tunnel that are meant": (
        replace(saw(EXIT), routed=routed(*ONE_NETWORK)),
        Policy(allowed_outside=(ip_network("5.9.0.0/16"),)), State.PROTECTED, [],
    ),
    "everything goes another way, and the tunnel nothing": (
        replace(saw(EXIT, path=Path.UNKNOWN), routed=routed("eth0", "0.0.0.0/0", tunnel=False)),
        POLICY, State.PROTECTED, [],
    ),
    "a balanced route, and the answers came through the tunnel": (
        saw(EXIT, canary(EXIT, Path.OUTSIDE, target="cloudflare")), UNDECLARED, State.PROTECTED, [],
    ),
    # -- the numbers are rows of the scenarios
    "1 healthy, kill switch on": (saw(EXIT), POLICY, State.PROTECTED, []),
    "2 healthy, no kill switch": (saw(EXIT, beside=HOME), POLICY, State.PROTECTED, [Code.KILLSWITCH_OPEN]),
    "2 no kill switch, told by the first router": (
        saw(EXIT, beside=LOST, first_hop=EXPIRED), POLICY, State.PROTECTED, [Code.KILLSWITCH_OPEN],
    ),
    "3 tunnel link set down, kill switch": (saw(BLOCKED, link=SET_DOWN), POLICY, State.DOWN, [Code.TUNNEL_DOWN]),
    "4 tunnel deleted, kill switch": (
        saw(BLOCKED, link=GONE, interfaces=("eth0",)), POLICY, State.DOWN, [Code.TUNNEL_DOWN],
    ),
    "5 tunnel deleted, no kill switch": (
        saw(HOME, link=GONE, path=Path.OUTSIDE, beside=None), POLICY, State.LEAKING, [Code.IP_LEAK],
    ),
    "5 tunnel deleted, no kill switch, and nobody declared a home": (
        saw(HOME, link=GONE, path=Path.OUTSIDE, beside=None), UNDECLARED, State.LEAKING, [Code.IP_LEAK],
    ),
    "6 VPN server unreachable, no kill switch": (
        saw(LOST, beside=HOME), POLICY, State.DOWN, [Code.NO_TRAFFIC, Code.KILLSWITCH_OPEN],
    ),
    "7 handshake without forwarding": (saw(LOST), POLICY, State.DOWN, [Code.NO_TRAFFIC]),
    "8 key revoked": (saw(LOST, LOST), POLICY, State.DOWN, [Code.NO_TRAFFIC]),
    "9 half-open": (saw(UNREACHABLE), POLICY, State.DOWN, [Code.NO_TRAFFIC]),
    "12 exit in a country outside the policy, by two sources": (
        saw(EXIT, places=TWO_SAY_DE), NL_ONLY, State.DEGRADED, [Code.COUNTRY_MISMATCH],
    ),
    "12 exit in a country outside the policy, by one source alone": (
        saw(EXIT, places=TWO_SAY_DE[:1]), NL_ONLY, State.PROTECTED, [],
    ),
    "12 exit in a country of the policy": (
        saw(EXIT, places=(place(EXIT, "SE"), place(EXIT, "SE", "ipinfo"))), NL_ONLY, State.PROTECTED, [],
    ),
    "12 two sources against one": (
        saw(EXIT, places=(*TWO_SAY_DE, place(EXIT, "NL", "ipapi"))), NL_ONLY, State.DEGRADED, [Code.COUNTRY_MISMATCH],
    ),
    "13 geolocation sources disagree": (
        saw(EXIT, places=(place(EXIT, "DE"), place(EXIT, "NL", "ipinfo"))),
        NL_ONLY, State.PROTECTED, [Code.LOCATION_UNCERTAIN],
    ),
    "13 one source contradicts itself": (
        saw(EXIT, places=(place(EXIT, "DE"), place(EXIT, "NL"))), NL_ONLY, State.PROTECTED, [],
    ),
    "14 exit address of which nobody knows anything": (saw(EXIT), NL_ONLY, State.PROTECTED, []),
    "15 resolver reached outside the tunnel": (
        saw(EXIT, dns=(asked(ISP_RESOLVER, "91.10.0.53", Path.OUTSIDE),)), UNDECLARED, State.LEAKING, [Code.DNS_LEAK],
    ),
    "16 local forwarder asks the ISP": (
        saw(EXIT, dns=(asked("91.10.20.53", "127.0.0.11", Path.LOCAL),)), POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "16 LAN resolver asks the ISP, as the policy allows by its address": (
        saw(EXIT, dns=(asked("91.10.20.53", "192.168.1.2", Path.OUTSIDE),)),
        replace(POLICY, allowed_resolvers=(ip_network("192.168.1.2"),)), State.PROTECTED, [],
    ),
    "16 LAN resolver asks the ISP, as the policy allows by its egress": (
        saw(EXIT, dns=(asked("91.10.20.53", "192.168.1.2", Path.OUTSIDE),)),
        replace(POLICY, allowed_resolvers=(ip_network("91.10.20.53"),)), State.PROTECTED, [],
    ),
    "17 public resolver through the tunnel, foreign point of presence": (
        saw(EXIT, dns=(asked("172.70.1.1", "1.1.1.1"),), places=(place("172.70.1.1", "US"), place(EXIT, "NL"))),
        POLICY, State.PROTECTED, [],
    ),
    "17 public resolver known by its AS alone": (
        saw(EXIT, dns=(asked(STRANGER, "9.9.9.9"),), places=(place(STRANGER, "US", asn=19281),)),
        POLICY, State.PROTECTED, [],
    ),
    "18 public resolver outside the tunnel, by path": (
        saw(EXIT, dns=(asked("172.70.1.1", "1.1.1.1", Path.OUTSIDE),)), POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "18 public resolver outside the tunnel, by whoami": (
        saw(EXIT, dns=(asked(None, "1.1.1.1", Path.UNKNOWN, client=HOME),)), POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "18 public resolver passes the home network on": (
        saw(EXIT, dns=(asked("74.125.1.1", "8.8.8.8", Path.UNKNOWN, subnet="91.10.20.0/24"),)),
        POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "18 public resolver passes the exit's network on": (
        saw(EXIT, dns=(asked("74.125.1.1", "8.8.8.8", subnet="146.70.1.0/24"),)), POLICY, State.PROTECTED, [],
    ),
    "19 provider's resolver beside the exit": (
        saw(EXIT, dns=(asked("146.70.1.99"),)), POLICY, State.PROTECTED, [],
    ),
    "19 provider's resolver in another country, in the exit's AS": (
        saw(EXIT, dns=(asked(STRANGER),), places=(place(STRANGER, "SE", asn=9009), place(EXIT, "NL", asn=9009))),
        POLICY, State.PROTECTED, [],
    ),
    "20 two resolvers, one leaks": (
        saw(EXIT, dns=(asked("146.70.1.99"), asked("91.10.20.53", "91.10.20.53"))),
        POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "21 DNS intercepted at home": (
        saw(EXIT, dns=(asked("91.10.20.53", "9.9.9.9", Path.OUTSIDE),), intercepted=True),
        POLICY, State.LEAKING, [Code.DNS_INTERCEPTED, Code.DNS_LEAK],
    ),
    "21 DNS intercepted inside the tunnel": (
        saw(EXIT, dns=(asked("146.70.1.99"),), intercepted=True), POLICY, State.PROTECTED, [Code.DNS_INTERCEPTED],
    ),
    "22 resolver down, tunnel fine": (
        saw(EXIT, dns=(asked(answer=LOST), asked(answer=UNREACHABLE, server="10.64.0.2"))),
        POLICY, State.DEGRADED, [Code.DNS_DOWN],
    ),
    "23 one DNS method blocked, another answers": (
        saw(EXIT, dns=(asked(None), asked("146.70.1.99"))), POLICY, State.PROTECTED, [],
    ),
    "23 no DNS method tells": (saw(EXIT, dns=(asked(None),)), POLICY, State.PROTECTED, [Code.RESOLVER_UNKNOWN]),
    "23 one lookup lost and the other never sent": (
        saw(EXIT, dns=(asked(answer=LOST), asked(answer=Answer.UNKNOWN))),
        POLICY, State.PROTECTED, [Code.RESOLVER_UNKNOWN],
    ),
    "24 IPv6 escapes, IPv4 does not": (
        saw(EXIT, canary(HOME6, Path.OUTSIDE)), POLICY, State.LEAKING, [Code.IPV6_LEAK],
    ),
    "24 IPv6 escapes from an address that nobody declared": (
        saw(EXIT, canary("2a02:908::1", Path.OUTSIDE)), POLICY, State.LEAKING, [Code.IPV6_LEAK],
    ),
    "25 IPv6 present but dropped": (saw(EXIT, canary(LOST, family=6)), POLICY, State.PROTECTED, []),
    "26 IPv6 inside the tunnel": (saw(EXIT, EXIT6), POLICY, State.PROTECTED, []),
    "27 part of the traffic routed outside": (
        saw(EXIT, canary(HOME, Path.OUTSIDE, target="cloudflare")), POLICY, State.LEAKING, [Code.SPLIT_ROUTE],
    ),
    "27 part of the IPv6 traffic routed outside": (
        saw(EXIT, EXIT6, canary(HOME6, Path.OUTSIDE, target="cloudflare")),
        POLICY, State.LEAKING, [Code.SPLIT_ROUTE],
    ),
    "27 every destination outside is no split": (
        saw(canary(HOME, Path.OUTSIDE), canary(HOME, Path.OUTSIDE, target="cloudflare")),
        POLICY, State.LEAKING, [Code.IP_LEAK],
    ),
    "27 an answer without an address tells of no way through the tunnel": (
        saw(canary(HOME, Path.OUTSIDE), canary("", Path.OUTSIDE, target="cloudflare")),
        POLICY, State.LEAKING, [Code.IP_LEAK],
    ),
    "27 both families escape": (
        saw(canary(HOME, Path.OUTSIDE), canary(HOME6, Path.OUTSIDE)),
        POLICY, State.LEAKING, [Code.IP_LEAK, Code.IPV6_LEAK],
    ),
    "28 orphaned namespace": (
        saw(UNREACHABLE, link=GONE, beside=None, interfaces=()), POLICY, State.DOWN, [Code.ORPHANED_NAMESPACE],
    ),
    "33 home internet down": (saw(LOST, beside=LOST), POLICY, State.DOWN, [Code.UPLINK_DOWN]),
    "33 home internet down, and the tunnel's interface with it": (
        saw(UNREACHABLE, link=GONE, beside=UNREACHABLE), POLICY, State.DOWN, [Code.UPLINK_DOWN],
    ),
    "35 one canary site blocks VPN exits": (saw(EXIT, canary(LOST, target="opendns")), POLICY, State.PROTECTED, []),
    "7 the VPN server answers and forwards nothing": (
        saw(LOST, canary(EXIT, probe=Probe.GATEWAY, target="10.64.0.1")), POLICY, State.DOWN, [Code.NO_FORWARDING],
    ),
    "10 idle, and the last handshake is old": (
        replace(saw(EXIT), claims=(Claim(source="wireguard", handshake_age=4000.0),)), POLICY, State.PROTECTED, [],
    ),
    "15 a question to the ISP's resolver was seen to leave": (
        replace(saw(EXIT), escapes=escaped("91.10.0.53", 53, "example.org")), POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "15 it was seen by both ways, and is told once": (
        replace(
            saw(EXIT, dns=(asked("91.10.20.53", "91.10.20.53", Path.OUTSIDE),)), escapes=escaped("91.10.20.53", 53)
        ),
        POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "15 the resolver that was asked outside is the policy's": (
        replace(saw(EXIT), escapes=escaped("192.168.1.2", 53)),
        replace(POLICY, allowed_resolvers=(ip_network("192.168.1.2"),)), State.PROTECTED, [],
    ),
    "16 a question to the home router was seen, and nothing tells whom that asks": (
        replace(saw(EXIT), escapes=escaped("192.168.1.1", 53, "example.org")), POLICY, State.PROTECTED, [],
    ),
    "16 a question to a link-local resolver by TLS was seen": (
        replace(saw(EXIT), escapes=escaped("fe80::1", 853)), POLICY, State.PROTECTED, [],
    ),
    "16 the router that was seen to be asked comes out at the ISP": (
        replace(
            saw(EXIT, dns=(asked("80.58.184.30", "192.168.1.1", Path.OUTSIDE),)), escapes=escaped("192.168.1.1", 53)
        ),
        UNDECLARED, State.LEAKING, [Code.DNS_LEAK],
    ),
    "15 DNS over TLS was seen to leave": (
        replace(saw(EXIT), escapes=escaped("9.9.9.9", 853)), POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "24 an IPv6 packet left beside a tunnel for IPv4": (
        replace(saw(EXIT), escapes=escaped("2a02:908::1")), POLICY, State.LEAKING, [Code.IPV6_LEAK],
    ),
    "27 a packet left outside while canaries go through": (
        replace(saw(EXIT), escapes=escaped("203.0.113.9")), POLICY, State.LEAKING, [Code.SPLIT_ROUTE],
    ),
    "27 a packet left outside, and the canaries are not back yet": (
        replace(saw(beside=None), escapes=escaped("203.0.113.9")), POLICY, State.LEAKING, [Code.SPLIT_ROUTE],
    ),
    "27 a split that the policy declares": (
        replace(saw(EXIT), escapes=escaped("203.0.113.9")),
        replace(POLICY, allowed_outside=(ip_network("203.0.113.0/24"),)), State.PROTECTED, [],
    ),
    "29 a packet left before the tunnel was up": (
        replace(saw(beside=None, link=GONE), escapes=escaped("203.0.113.9")), POLICY, State.LEAKING, [Code.IP_LEAK],
    ),
    "30 large packets vanish": (
        replace(saw(EXIT), quality=pulses(vanished=1420)), POLICY, State.DEGRADED, [Code.MTU_BLACKHOLE],
    ),
    "31 the line is full": (
        replace(saw(EXIT), quality=pulses(rtt_ms=2500)), POLICY, State.DEGRADED, [Code.HIGH_LATENCY],
    ),
    "32 a third of the pulses is lost": (
        replace(saw(EXIT), quality=pulses(lost=9)), POLICY, State.DEGRADED, [Code.HIGH_LOSS],
    ),
    "32 some are lost, as the policy takes": (replace(saw(EXIT), quality=pulses(lost=6)), POLICY, State.PROTECTED, []),
    "33 the reference agent has no internet either": (
        replace(saw(BLOCKED, link=GONE), reference_up=False), POLICY, State.DOWN, [Code.UPLINK_DOWN],
    ),
    "33 nothing answers beside the tunnel, but the reference agent has internet": (
        replace(saw(LOST, beside=LOST), reference_up=True), POLICY, State.DOWN, [Code.NO_TRAFFIC],
    ),
    "34 captive portal": (replace(saw(LOST, beside=LOST), portal=True), POLICY, State.DOWN, [Code.CAPTIVE_PORTAL]),
    "35 a site that shuns VPN exits is marked": (
        replace(saw(EXIT), flaky=("opendns",)), POLICY, State.PROTECTED, [Code.CANARY_FLAKY],
    ),
    "38 forwarded port closed": (
        replace(
            saw(EXIT), forwarded_port=50123, port_check=PortCheck(address=ip_address(EXIT), port=50123, answer=LOST)
        ),
        POLICY, State.DEGRADED, [Code.PORT_CLOSED],
    ),
    "38 nobody listens behind the forwarded port": (
        replace(
            saw(EXIT), forwarded_port=50123,
            port_check=PortCheck(address=ip_address(EXIT), port=50123, answer=UNREACHABLE),
        ),
        POLICY, State.PROTECTED, [],
    ),
    "44 gluetun says that it runs": (
        replace(saw(LOST), claims=(Claim(source="gluetun", status="running"),)), POLICY, State.DOWN, [Code.NO_TRAFFIC],
    ),
    # -- what the server sees of pulses by itself
    "a pulse from home": (pulse(HOME), POLICY, State.LEAKING, [Code.IP_LEAK]),
    "a pulse from the exit proves no health": (pulse(EXIT), POLICY, State.UNKNOWN, []),
    "an agent that does not hear the replies": (pulse(EXIT, unheard=True), POLICY, State.DOWN, [Code.NO_TRAFFIC]),
    # -- what the agent does, and what it cannot see
    "the agent closed the namespace": (
        replace(saw(BLOCKED, link=GONE), contained=True), POLICY, State.DOWN, [Code.TUNNEL_DOWN, Code.CONTAINED],
    ),
    "names that do not exist get an address": (
        replace(saw(EXIT), dns_rewritten=True), POLICY, State.PROTECTED, [Code.DNS_REWRITTEN],
    ),
    "packets cannot be watched": (
        replace(saw(EXIT), leak_watch=False), POLICY, State.PROTECTED, [Code.LEAK_WATCH_OFF],
    ),
    "UDP to the server is closed": (replace(saw(EXIT), pulses=False), POLICY, State.PROTECTED, [Code.PULSES_BLOCKED]),
    # -- what could not be looked at
    "nothing was asked": (saw(beside=None), POLICY, State.UNKNOWN, [Code.NOTHING_SEEN]),
    "nothing was asked, and no tunnel is known": (
        saw(beside=None, link=None), POLICY, State.UNKNOWN, [Code.NOTHING_SEEN],
    ),
    "a canary that was not sent counts as not asked": (
        saw(Answer.UNKNOWN, beside=None), POLICY, State.UNKNOWN, [Code.NOTHING_SEEN],
    ),
    "no tunnel is known and nothing answers": (
        saw(LOST, beside=None, link=None), POLICY, State.UNKNOWN, [Code.NO_NETWORK],
    ),
    "no tunnel and no home is known": (
        saw(EXIT, beside=None, link=None), UNDECLARED, State.UNKNOWN, [Code.TUNNEL_UNKNOWN],
    ),
    "no tunnel is known, and lesser trouble is": (
        replace(saw(EXIT, beside=None, link=None), system_lookup=FAILS), UNDECLARED, State.UNKNOWN,
        [Code.TUNNEL_UNKNOWN, Code.DNS_DOWN],
    ),
    "no tunnel is known, and the answer showed no address": (
        saw("", beside=None, link=None), POLICY, State.UNKNOWN, [Code.TUNNEL_UNKNOWN],
    ),
    "no tunnel is known, and the home is declared for the other family alone": (
        saw(EXIT6, beside=None, link=None),
        Policy(home_networks=(ip_network("91.10.20.0/24"),)), State.UNKNOWN, [Code.TUNNEL_UNKNOWN],
    ),
    "no tunnel is known, but the exit is not the home": (
        saw(EXIT, beside=None, link=None), POLICY, State.PROTECTED, [Code.TUNNEL_UNSEEN],
    ),
    "no tunnel is known: the physical interface is the way out": (
        saw(EXIT, beside=EXIT, link=None, path=Path.OUTSIDE), POLICY, State.PROTECTED, [Code.TUNNEL_UNSEEN],
    ),
    "only the owner says that the device is the tunnel, and no home is known": (
        saw(EXIT, beside=None, link=BY_WORD), Policy(), State.PROTECTED, [Code.TUNNEL_UNSEEN],
    ),
    "only the owner says so, and the home is another address": (
        saw(EXIT, beside=None, link=BY_WORD), POLICY, State.PROTECTED, [Code.TUNNEL_UNSEEN],
    ),
    "only the owner says so, and it is the home": (
        saw(HOME, beside=None, link=BY_WORD), POLICY, State.LEAKING, [Code.IP_LEAK],
    ),
    "only the owner says so, and packets beside it come out elsewhere": (
        saw(EXIT, beside=HOME, link=BY_WORD), Policy(), State.PROTECTED, [Code.KILLSWITCH_OPEN],
    ),
    "no tunnel is known, and the exit is in another AS than home": (
        replace(
            saw(EXIT, beside=None, link=None, path=Path.OUTSIDE),
            places=(place(EXIT, asn=9009), place("91.10.20.0", asn=3320)),
        ),
        POLICY, State.PROTECTED, [],
    ),
    "no tunnel is known, and traffic leaves from another address of the home's provider": (
        replace(
            saw("91.33.7.8", beside=None, link=None, path=Path.OUTSIDE),
            places=(place("91.33.7.8", asn=3320), place("91.10.20.0", asn=3320)),
        ),
        POLICY, State.UNKNOWN, [Code.TUNNEL_UNKNOWN],
    ),
    "no tunnel is known, and traffic leaves from the neighbourhood of the old home address": (
        saw("91.10.20.99", beside=None, link=None, path=Path.OUTSIDE),
        Policy(home_networks=(ip_network("91.10.20.30/32"),)), State.UNKNOWN, [Code.TUNNEL_UNKNOWN],
    ),
    "no tunnel is known, and IPv6 leaves from the next prefix of home's provider": (
        replace(
            saw("2003:f1::5", beside=None, link=None, path=Path.OUTSIDE),
            places=(place("2003:f1::5", asn=3320), place("2003:e0::", asn=3320)),
        ),
        POLICY, State.UNKNOWN, [Code.TUNNEL_UNKNOWN],
    ),
    "no tunnel is known, and a private network is declared as home": (
        saw(EXIT, beside=None, link=None), Policy(home_networks=(ip_network("192.168.20.0/24"),)),
        State.UNKNOWN, [Code.TUNNEL_UNKNOWN],
    ),
    "a firewall marks connections, and a rule for the mark leads them home": (
        saw(EXIT, canary(HOME, target="trace"), beside=HOME),
        UNDECLARED, State.LEAKING, [Code.SPLIT_ROUTE, Code.KILLSWITCH_OPEN],
    ),
    "all comes out where a packet beside the tunnel does": (
        saw(HOME, beside=HOME), UNDECLARED, State.UNKNOWN, [Code.TUNNEL_UNKNOWN, Code.KILLSWITCH_OPEN],
    ),
    "an old client's word says no more than the home addresses do": (
        replace(saw(EXIT, beside=None, link=None), interfaces=None), POLICY, State.PROTECTED, [],
    ),
    "no tunnel is known, and the exit is the home": (
        saw(HOME, beside=None, link=None, path=Path.OUTSIDE), POLICY, State.LEAKING, [Code.IP_LEAK],
    ),
    "an answer without an address, outside the tunnel, proves nothing": (
        saw(EXIT, canary("", Path.OUTSIDE)), POLICY, State.PROTECTED, [],
    ),
    "the tunnel is gone, and something answers by a way that nobody knows": (
        saw(STRANGER, link=GONE, path=Path.UNKNOWN), UNDECLARED, State.DOWN, [Code.TUNNEL_DOWN],
    ),
    "the tunnel's first interface is down, but a second carries": (
        saw(EXIT, link=SET_DOWN), POLICY, State.PROTECTED, [],
    ),
    "a lookup that nobody answered never leaks": (
        saw(EXIT, dns=(asked("91.10.20.53", "1.1.1.1", Path.OUTSIDE, LOST), asked("146.70.1.99"))),
        POLICY, State.PROTECTED, [],
    ),
    "a resolver on the LAN, outside the tunnel, that asks through it": (
        saw(EXIT, dns=(asked("146.70.1.99", "192.168.1.2", Path.OUTSIDE),)), POLICY, State.PROTECTED, [],
    ),
    "16 the home router asks the ISP, and nothing but the path tells": (
        saw(EXIT, dns=(asked("80.58.184.30", "192.168.1.1", Path.OUTSIDE),)), UNDECLARED, State.LEAKING,
        [Code.DNS_LEAK],
    ),
    "16 a forwarder on the container's own subnet": (
        saw(EXIT, dns=(asked("80.58.184.30", "172.17.0.1", Path.OUTSIDE),)), UNDECLARED, State.LEAKING,
        [Code.DNS_LEAK],
    ),
    "16 a LAN forwarder that asks a public resolver from home": (
        saw(EXIT, dns=(asked("172.70.1.1", "192.168.1.2", Path.OUTSIDE),)), UNDECLARED, State.LEAKING,
        [Code.DNS_LEAK],
    ),
    "16 a carrier's resolver in shared address space": (
        saw(EXIT, dns=(asked("80.58.184.30", "100.64.0.1", Path.OUTSIDE),)), UNDECLARED, State.LEAKING,
        [Code.DNS_LEAK],
    ),
    "16 a router's link-local IPv6 address": (
        saw(EXIT, dns=(asked("2a02:908::53", "fe80::1", Path.OUTSIDE),)), UNDECLARED, State.LEAKING, [Code.DNS_LEAK],
    ),
    "16 a unique local IPv6 address": (
        saw(EXIT, dns=(asked("2a02:908::53", "fd00::1", Path.OUTSIDE),)), UNDECLARED, State.LEAKING, [Code.DNS_LEAK],
    ),
    "16 a LAN forwarder that Cloudflare saw ask from home": (
        saw(EXIT, dns=(asked(None, "192.168.1.1", Path.OUTSIDE, client=HOME),)), UNDECLARED, State.LEAKING,
        [Code.DNS_LEAK],
    ),
    "16 a LAN forwarder that Cloudflare saw ask from the exit": (
        saw(EXIT, dns=(asked(None, "192.168.1.1", Path.OUTSIDE, client=EXIT),)), UNDECLARED, State.PROTECTED,
        [Code.RESOLVER_UNKNOWN],
    ),
    "16 a LAN forwarder of which no egress shows": (
        saw(EXIT, dns=(asked(None, "192.168.1.1", Path.OUTSIDE),)), UNDECLARED, State.PROTECTED,
        [Code.RESOLVER_UNKNOWN],
    ),
    "16 the same beside one that is well": (
        saw(EXIT, dns=(asked(None, "192.168.1.1", Path.OUTSIDE), asked("146.70.1.99"))), UNDECLARED, State.PROTECTED,
        [Code.RESOLVER_UNKNOWN],
    ),
    "16 a LAN forwarder that asks in the exit's AS": (
        saw(
            EXIT, dns=(asked(STRANGER, "192.168.1.2", Path.OUTSIDE),),
            places=(place(STRANGER, asn=9009), place(EXIT, asn=9009)),
        ),
        UNDECLARED, State.PROTECTED, [],
    ),
    "16 the same where home is in that AS too": (
        saw(
            EXIT, dns=(asked(STRANGER, "192.168.1.2", Path.OUTSIDE),),
            places=(place(STRANGER, asn=3320), *ISP_PLACES, place(EXIT, asn=3320)),
        ),
        POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "an ad blocker's 0.0.0.0 is no egress": (
        saw(EXIT, dns=(asked("0.0.0.0", "127.0.0.1", Path.LOCAL), asked("146.70.1.99"))), POLICY, State.PROTECTED, [],
    ),
    "the blocker's own address is no egress either": (
        saw(EXIT, dns=(asked("192.168.1.2", "192.168.1.2", Path.OUTSIDE),)), POLICY, State.PROTECTED,
        [Code.RESOLVER_UNKNOWN],
    ),
    "programs cannot look names up, though the nameserver answers": (
        replace(saw(EXIT, dns=(asked("146.70.1.99"),)), system_lookup=FAILS), POLICY, State.DEGRADED, [Code.DNS_DOWN],
    ),
    "nothing names a nameserver, and programs fail": (
        replace(saw(EXIT), system_lookup=FAILS), POLICY, State.DEGRADED, [Code.DNS_DOWN],
    ),
    "no nameserver answers, and programs fail": (
        replace(saw(EXIT, dns=(asked(answer=LOST),)), system_lookup=FAILS), POLICY, State.DEGRADED, [Code.DNS_DOWN],
    ),
    "no nameserver answers, and programs look names up otherwise": (
        replace(saw(EXIT, dns=(asked(answer=LOST),)), system_lookup=WORKS), POLICY, State.PROTECTED,
        [Code.RESOLVER_UNKNOWN],
    ),
    "programs use a resolver at home that resolv.conf does not name": (
        replace(saw(EXIT, dns=(asked("146.70.1.99"),)), system_lookup=comes_out("91.10.20.53")), POLICY,
        State.LEAKING, [Code.DNS_LEAK],
    ),
    "programs use the home provider's": (
        replace(saw(EXIT, dns=(asked("146.70.1.99"),), places=ISP_PLACES), system_lookup=comes_out("91.11.0.53")),
        POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "programs use a resolver of nobody's": (
        replace(saw(EXIT, dns=(asked("146.70.1.99"),)), system_lookup=comes_out(STRANGER)), POLICY, State.PROTECTED,
        [Code.RESOLVER_UNEXPECTED],
    ),
    "programs use the VPN's": (
        replace(saw(EXIT, dns=(asked(answer=LOST),)), system_lookup=comes_out("146.70.1.99")), POLICY, State.PROTECTED,
        [],
    ),
    "programs use one at home, and that may be a nameserver that the policy allows": (
        replace(saw(EXIT, dns=(asked(None, "192.168.1.2", Path.OUTSIDE),)), system_lookup=comes_out("91.10.20.53")),
        replace(POLICY, allowed_resolvers=(ip_network("192.168.1.2"),)), State.PROTECTED, [Code.RESOLVER_UNKNOWN],
    ),
    "the same by the resolver that the policy allows": (
        replace(saw(EXIT, dns=(asked("146.70.1.99"),)), system_lookup=comes_out("91.10.20.53")),
        replace(POLICY, allowed_resolvers=(ip_network("91.10.20.53"),)), State.PROTECTED, [],
    ),
    "programs look names up": (
        replace(saw(EXIT, dns=(asked("146.70.1.99"),)), system_lookup=WORKS), POLICY, State.PROTECTED, [],
    ),
    "a DNS leak, and programs cannot look names up": (
        replace(saw(EXIT, dns=(asked("91.10.20.53", "91.10.20.53"),)), system_lookup=FAILS), POLICY, State.LEAKING,
        [Code.DNS_LEAK, Code.DNS_DOWN],
    ),
    "a public resolver outside, where no tunnel is known": (
        saw(EXIT, link=None, beside=None, dns=(asked("172.70.1.1", "1.1.1.1", Path.OUTSIDE),)),
        POLICY, State.PROTECTED, [Code.TUNNEL_UNSEEN],
    ),
    "a client subnet of the other family is not the home": (
        saw(EXIT, dns=(asked("74.125.1.1", "8.8.8.8", subnet="2a0d:5600::/48"),)),
        Policy(home_networks=(ip_network("91.10.20.0/24"),)), State.PROTECTED, [],
    ),
    # -- resolvers that nobody knows
    "a stranger resolves": (saw(EXIT, dns=(asked(STRANGER),)), POLICY, State.PROTECTED, [Code.RESOLVER_UNEXPECTED]),
    "a stranger resolves, of IPv6": (
        saw(EXIT, dns=(asked("2a02:908::53"),)), POLICY, State.PROTECTED, [Code.RESOLVER_UNEXPECTED],
    ),
    "a stranger is told once, however often it was seen": (
        saw(EXIT, dns=(asked(STRANGER), asked(STRANGER))), POLICY, State.PROTECTED, [Code.RESOLVER_UNEXPECTED],
    ),
    "the stranger is the policy's own": (
        saw(EXIT, dns=(asked(STRANGER),)),
        replace(POLICY, allowed_resolvers=(ip_network("77.77.77.0/24"),)), State.PROTECTED, [],
    ),
    "the resolver sits in the home provider's AS": (
        saw(EXIT, dns=(asked("91.11.0.53"),), places=ISP_PLACES), POLICY, State.LEAKING, [Code.DNS_LEAK],
    ),
    "the VPN's exit sits in the home provider's AS too": (
        saw(EXIT, dns=(asked("91.11.0.53"),), places=(*ISP_PLACES, place(EXIT, asn=3320))), POLICY, State.PROTECTED, [],
    ),
    # -- keepalives: that one arrived proves that something carries it
    "a keepalive from the VPN": (keepalive(EXIT), POLICY, State.PROTECTED, []),
    "a keepalive that names the home address": (keepalive(HOME), POLICY, State.LEAKING, [Code.IP_LEAK]),
    "a keepalive that names the VPN and comes from home": (
        keepalive(EXIT, reported_from=HOME), POLICY, State.LEAKING, [Code.IP_LEAK],
    ),
    "a keepalive that comes from home by IPv6": (
        keepalive(EXIT, reported_from=HOME6), POLICY, State.LEAKING, [Code.IPV6_LEAK],
    ),
    "a keepalive that names nothing and comes from the VPN": (
        keepalive(reported_from=EXIT), POLICY, State.PROTECTED, [],
    ),
    "a keepalive that names nothing, over the LAN": (keepalive(), POLICY, State.UNKNOWN, [Code.TUNNEL_UNKNOWN]),
    "a keepalive where no home is known": (
        keepalive(EXIT, reported_from=EXIT), UNDECLARED, State.UNKNOWN, [Code.TUNNEL_UNKNOWN],
    ),
    # -- together
    "a leak does not hide what else is wrong": (
        saw(EXIT, canary(HOME6, Path.OUTSIDE), beside=HOME, dns=(asked(answer=LOST),)),
        POLICY, State.LEAKING, [Code.IPV6_LEAK, Code.DNS_DOWN, Code.KILLSWITCH_OPEN],
    ),
    "a dead tunnel is asked nothing else": (
        saw(LOST, places=TWO_SAY_DE, intercepted=True), NL_ONLY, State.DOWN, [Code.NO_TRAFFIC],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("seen", "policy", "state", "codes"), CASES.values(), ids=CASES.keys())
def test_judge(seen: Observation, policy: Policy, state: State, codes: list[Code]) -> None:
    verdict = judge(seen, policy)
    assert (verdict.state, [f.code for f in verdict.findings]) == (state, codes)


@pytest.mark.parametrize(("seen", "policy"), [c[:2] for c in CASES.values()], ids=CASES.keys())
def test_a_finding_says_what_and_shows_its_facts(seen: Observation, policy: Policy) -> None:
    for finding in judge(seen, policy).findings:
        assert finding.message.endswith(".")
        assert "None" not in finding.message
        assert "unknown" not in finding.message.replace("an unknown address", "")
        assert all(isinstance(k, str) and isinstance(v, str) and v for k, v in finding.evidence.items())


# Said by the machine, by the tracker, and never by the judge.
ELSEWHERE = {Code.NO_REPORTS, Code.FLAPPING, Code.NAME_SHARED, Code.CLOCK_SKEW, Code.OBSERVATIONS_LOST}


def test_a_dns_leak_seen_both_ways_tells_what_both_show() -> None:
    dns = (asked("91.10.20.53", "91.10.20.53", Path.OUTSIDE),)
    (leak,) = judge(replace(saw(EXIT, dns=dns), escapes=escaped("91.10.20.53", 53, "example.org")), POLICY).findings
    assert (leak.evidence["name"], leak.evidence["resolver"], leak.evidence["seen_by"]) == (
        "example.org", "91.10.20.53", "a lookup of whoami.akamai.net",
    )  # fmt: skip


def test_every_code_has_a_case() -> None:
    assert {code for *_, codes in CASES.values() for code in codes} == set(Code) - ELSEWHERE


def test_every_code_has_a_meaning_and_an_advice() -> None:
    assert set(MEANING) == set(Code)
    for code, meaning in MEANING.items():
        finding = Finding(code, "It is so.")
        assert finding.severity is meaning.severity
        assert finding.advice.endswith(".")
        # Whatever makes a tunnel's state bad is loud enough to be heard.
        assert (meaning.state is State.PROTECTED) or meaning.severity is not Severity.INFO


def test_a_leak_is_the_worst_and_protected_the_least() -> None:
    assert (HARM[0], HARM[-1]) == (State.LEAKING, State.PROTECTED)
    assert worst(()) is State.PROTECTED
    assert worst((Finding(Code.DNS_DOWN, ""), Finding(Code.IP_LEAK, ""), Finding(Code.NO_TRAFFIC, ""))) is State.LEAKING


ROTATION = [
    pytest.param(asked("91.10.20.53", "1.1.1.1", Path.OUTSIDE, client=HOME), "in the home network", id="1 egress"),
    pytest.param(asked(STRANGER, "1.1.1.1", Path.OUTSIDE, client=HOME), "asked from the home address", id="2 whoami"),
    pytest.param(asked(STRANGER, "1.1.1.1", Path.OUTSIDE, subnet="91.10.0.0/16"), "client subnet", id="2 subnet"),
    pytest.param(asked(STRANGER, "1.1.1.1", Path.OUTSIDE), "leave outside the tunnel", id="2 path"),
    pytest.param(asked("91.11.0.53"), "AS3320", id="the provider's AS"),
]


@pytest.mark.parametrize(("sighting", "words"), ROTATION)
def test_a_dns_leak_is_told_by_its_strongest_proof(sighting: ResolverSighting, words: str) -> None:
    (finding,) = judge(saw(EXIT, dns=(sighting,), places=ISP_PLACES), POLICY).findings
    assert words in finding.message
    assert finding.evidence["nameserver"] == str(sighting.nameserver)


def test_a_leak_by_a_local_forwarder_names_what_a_capture_shows() -> None:
    (leak,) = judge(saw(EXIT, dns=(asked("80.58.184.30", "192.168.1.1", Path.OUTSIDE),)), UNDECLARED).findings
    assert "192.168.1.1" in leak.message
    assert "80.58.184.30" in leak.message


MISSING = [
    pytest.param((), UNDECLARED, "the AS number of 77.77.77.77", id="its own"),
    pytest.param((place(STRANGER, asn=1),), UNDECLARED, "the home address", id="home"),
    pytest.param((place(STRANGER, asn=1),), POLICY, "the AS number of the home network", id="home's"),
]


@pytest.mark.parametrize(("places", "policy", "gap"), MISSING)
def test_an_unexpected_resolver_says_what_is_missing(places: tuple[Place, ...], policy: Policy, gap: str) -> None:
    (finding,) = judge(saw(EXIT, dns=(asked(STRANGER),), places=places), policy).findings
    assert finding.message.endswith(f"cannot be determined without {gap}.") or gap in finding.message


def test_a_system_resolver_that_fails_alone_is_told_as_such() -> None:
    (finding,) = judge(replace(saw(EXIT, dns=(asked("146.70.1.99"),)), system_lookup=FAILS), POLICY).findings
    assert finding.message == (
        "Programs cannot look names up here: the system's resolver fails (EAI_AGAIN), though 10.64.0.1 answers when "
        "asked directly."
    )


def test_a_country_is_never_a_reason_for_a_dns_leak() -> None:
    abroad = (place(EXIT, "CH"), place(STRANGER, "DE"))
    verdict = judge(saw(EXIT, dns=(asked(STRANGER),), places=abroad), POLICY)
    assert verdict.state is State.PROTECTED
    assert verdict.findings[0].evidence == {"resolver": STRANGER, "country": "DE"}


def test_a_leak_names_the_address_and_who_saw_it() -> None:
    (home,) = judge(saw(HOME, path=Path.OUTSIDE), POLICY).findings
    assert home.message == f"IPv4 traffic leaves from the home address {HOME}."
    assert home.evidence == {"address": HOME, "seen_by": "echo", "path": "outside", "tunnel": "up"}
    (outside,) = judge(saw(STRANGER, path=Path.OUTSIDE), POLICY).findings
    assert outside.message == f"IPv4 traffic leaves outside the tunnel, from {STRANGER}."


def test_a_router_without_an_address_is_no_fact() -> None:
    (finding,) = judge(saw(EXIT, first_hop=EXPIRED), POLICY).findings
    assert finding.evidence == {}
    named = replace(canary("192.168.1.1", Path.OUTSIDE, Probe.FIRST_HOP), answer=EXPIRED)
    (finding,) = judge(saw(EXIT, first_hop=named), POLICY).findings
    assert finding.evidence == {"router": "192.168.1.1"}


@pytest.mark.parametrize(
    ("named", "agreed"),
    [
        ([], None),
        ([None], None),
        (["NL"], "NL"),
        (["NL", "DE"], None),
        (["NL", "DE", "NL"], "NL"),
        (["NL", None], "NL"),
    ],
)
def test_the_country_is_what_most_sources_say(named: list[str | None], agreed: str | None) -> None:
    assert agreed_country(tuple(place(EXIT, c, f"source{i}") for i, c in enumerate(named))) == agreed


LEARNT: dict[str, tuple[Observation, list[str]]] = {
    "the address beside a working tunnel is home": (saw(EXIT, beside=HOME), [f"{HOME}/32"]),
    "both families are": (
        saw(EXIT, canary(HOME6, Path.OUTSIDE, Probe.PHYSICAL), beside=HOME), [f"{HOME6}/128", f"{HOME}/32"],
    ),
    "who answers DNS beside the tunnel in another's place is not home": (
        saw(EXIT, canary(ISP_RESOLVER, Path.OUTSIDE, Probe.PHYSICAL, "cloudflare"), beside=HOME), [f"{HOME}/32"],
    ),
    "by DNS alone it is all that is known": (
        saw(EXIT, canary(HOME, Path.OUTSIDE, Probe.PHYSICAL, "cloudflare"), beside=None), [f"{HOME}/32"],
    ),
    "a kill switch shows none": (saw(EXIT), []),
    "no tunnel, nothing learned": (saw(EXIT, beside=HOME, link=None), []),
    "a tunnel that is down teaches nothing": (saw(EXIT, beside=HOME, link=SET_DOWN), []),
    "a tunnel that is gone teaches nothing": (saw(EXIT, beside=HOME, link=GONE), []),
    "traffic that goes beside the tunnel teaches nothing": (saw(HOME, beside=HOME, path=Path.OUTSIDE), []),
    "the same address on both ways teaches nothing": (saw(EXIT, beside=EXIT), []),
    "a dead tunnel teaches nothing": (saw(LOST, beside=HOME), []),
}  # fmt: skip


@pytest.mark.parametrize(("seen", "learned"), LEARNT.values(), ids=LEARNT.keys())
def test_learned_home(seen: Observation, learned: list[str]) -> None:
    assert sorted(str(n) for n in with_learned_home(seen, UNDECLARED).home_networks) == sorted(learned)


def test_a_second_leak_of_the_same_kind_is_named_beside_the_first() -> None:
    """IPv6 goes through the tunnel too: one packet of it beside is the same finding as one of IPv4."""
    ends = ("203.0.113.9", "2a02:908::1", "203.0.113.9", "203.0.113.10", "203.0.113.11", "203.0.113.12", "203.0.113.13")
    seen = saw(EXIT, canary(EXIT6))
    (one,) = judge(replace(seen, escapes=escaped(ends[0])), POLICY).findings
    (two,) = judge(replace(seen, escapes=(*escaped(ends[0]), *escaped(ends[1]))), POLICY).findings
    (many,) = judge(replace(seen, escapes=sum(map(escaped, ends), ())), POLICY).findings
    assert "also" not in one.evidence
    assert (two.message, two.evidence["also"]) == (one.message, "UDP to [2a02:908::1]:443")
    assert many.evidence["also"].endswith("UDP to 203.0.113.11:443, UDP to 203.0.113.12:443 and 1 more")
    assert "203.0.113.9:443" not in many.evidence["also"]


def test_all_that_routes_send_outside_is_told_each_with_its_own_address() -> None:
    """Two families by one device and a second device: an IPv6 address is never said of an IPv4 network."""
    apart = canary(HOME6, Path.OUTSIDE, Probe.PHYSICAL)
    seen = replace(
        saw(EXIT, canary(EXIT6), replace(apart, interface="eth0"), beside=None),
        routed=(
            *(Routed(interface="wg0", family=f, share=0.9) for f in (4, 6)),
            *routed("eth0", "5.10.0.0/16", share=0.01, tunnel=False),
            Routed(interface="eth0", family=6, share=0.01, networks=(ip_network("2a01:4f8::/32"),), answer=EXPIRED),
            *routed("eth1", "7.7.0.0/16", share=0.01, tunnel=False),
        ),
    )
    leak = next(f for f in judge(seen, POLICY).findings if f.code is Code.SPLIT_ROUTE)
    assert leak.evidence["networks"] == "5.10.0.0/16"
    assert "comes_out_at" not in leak.evidence
    assert leak.evidence["also"] == (f"routes to 2a01:4f8::/32 (comes out at {HOME6}), routes to 7.7.0.0/16 by eth1")


def test_each_address_that_traffic_comes_out_at_beside_the_tunnel_is_told() -> None:
    """Two ways out: the second one's address is no less home's than the first one's."""
    ends = (canary(HOME, Path.OUTSIDE), canary(HOME, Path.OUTSIDE, target="x"), canary("91.10.20.31", Path.OUTSIDE))
    for through in ((), (canary(EXIT),)):
        (leak,) = judge(saw(*ends, *through), POLICY).findings
        assert (leak.evidence["address"], leak.evidence["also"]) == (HOME, "traffic from 91.10.20.31")


def test_packets_are_counted_by_the_device_that_is_named() -> None:
    (first,) = escaped("203.0.113.9")
    seen = replace(saw(EXIT), escapes=(replace(first, packets=2), replace(first, interface="eth1", packets=40)))
    (leak,) = judge(seen, POLICY).findings
    assert (leak.evidence["interface"], leak.evidence["packets"]) == ("eth0", "2")
    assert leak.evidence["also"] == "UDP to 203.0.113.9:443 by eth1"


@pytest.mark.parametrize(("server", "is_cause"), [("2620:fe::fe", True), ("9.9.9.9", False)])
def test_a_rule_is_the_cause_of_a_query_of_its_ip_version_alone(server: str, *, is_cause: bool) -> None:
    """Also where the report counts the networks of the rule, and names none."""
    parts = (
        Routed(interface="wg0", family=6, share=1.0),
        Routed(interface="eth0", family=6, share=0.1, more=3, only="UDP to port 53", ports=(53, 53)),
    )
    seen = replace(saw(EXIT, canary(EXIT6), dns=(asked("91.10.20.53", server, Path.OUTSIDE),)), routed=parts)
    leak = next(f for f in judge(seen, POLICY).findings if f.code is Code.DNS_LEAK)
    assert leak.evidence.get("by_rule") == ("UDP to port 53 by eth0" if is_cause else None)


def test_a_packet_of_another_resolver_is_told_beside_the_lookup_and_not_as_its_fact() -> None:
    dns = (asked("91.10.20.53", "192.168.1.1", Path.OUTSIDE),)
    (leak,) = judge(replace(saw(EXIT, dns=dns), escapes=escaped("9.9.9.9", 53)), POLICY).findings
    assert leak.evidence["nameserver"] == "192.168.1.1"
    assert "destination" not in leak.evidence
    assert leak.evidence["also"] == "UDP to 9.9.9.9:53 by eth0"


def test_each_nameserver_that_leaks_is_named() -> None:
    dns = tuple(asked(ISP_RESOLVER, f"192.168.{n}.1", Path.OUTSIDE) for n in (1, 2, 2))
    (leak,) = judge(saw(EXIT, dns=dns), POLICY).findings
    assert (leak.evidence["nameserver"], leak.evidence["also"]) == ("192.168.1.1", "the nameserver 192.168.2.1")


def test_each_way_out_is_said_with_the_address_of_its_own() -> None:
    beside = replace(canary(HOME, Path.OUTSIDE, Probe.PHYSICAL), interface="eth0")
    other = replace(canary("10.9.0.1", Path.OUTSIDE, Probe.FIRST_HOP), interface="wg1", answer=EXPIRED)
    (finding,) = judge(saw(EXIT, beside, other, beside=None), POLICY).findings
    assert finding.message == (
        f"A packet sent beside the tunnel by eth0 came out at {HOME}; one by wg1 reached the first router, 10.9.0.1; "
        "whether that one lets it through is not known."
    )
    assert finding.evidence == {"interfaces": "eth0, wg1"}


@pytest.mark.parametrize(("share", "code"), [(1.0, Code.SPLIT_ROUTE), (0.1, Code.IPV6_LEAK), (None, Code.IPV6_LEAK)])
def test_an_ipv6_packet_told_before_the_canaries_are_back_is_judged_by_routes(share: float | None, code: Code) -> None:
    """Where the tunnel takes IPv6 too, one packet beside it is no whole leak, and another round says the same."""
    inside = () if share is None else (Routed(interface="wg0", family=6, share=share),)
    seen = Observation(trigger=Trigger.LEAK, link=UP, routed=inside, escapes=escaped("2a02:908::1"))
    assert [f.code for f in judge(seen, POLICY).findings] == [code]


def test_what_came_out_beside_the_tunnel_is_said_by_who_cannot_be_diverted() -> None:
    diverted = canary(ISP_RESOLVER, Path.OUTSIDE, Probe.PHYSICAL, "cloudflare")
    seen = saw(EXIT, diverted, canary(HOME6, Path.OUTSIDE, Probe.PHYSICAL, "cloudflare"), beside=HOME)
    (finding,) = judge(seen, UNDECLARED).findings
    assert (finding.code, finding.evidence["address"]) == (Code.KILLSWITCH_OPEN, HOME)


def test_a_learned_home_must_not_be_seen_outside() -> None:
    policy = with_learned_home(saw(EXIT, beside=HOME), UNDECLARED)
    assert judge(saw(HOME, link=None, beside=None), policy).state is State.LEAKING
    assert with_learned_home(saw(EXIT, beside=HOME), policy) == policy


def test_the_policys_class_shows_its_defaults() -> None:
    assert (Policy.grace_down, Policy.grace_degraded, Policy.grace_recovery) == (2.0, 15.0, 4.0)


def test_addresses_and_networks_of_both_versions_have_one_name() -> None:
    assert isinstance(ip_address(EXIT), IPAddress)
    assert isinstance(ip_address(EXIT6), IPAddress)
    assert isinstance(ip_network("10.0.0.0/8"), IPNetwork)
    assert not isinstance(ip_network("10.0.0.0/8"), IPAddress)


def test_a_canary_has_a_family() -> None:
    with pytest.raises(ValueError, match="family is 4 or 6"):
        canary(LOST, family=5)


def test_an_echo_asked_by_dns_that_was_intercepted_is_no_exit() -> None:
    by_dns = canary(ISP_RESOLVER, target="cloudflare")
    assert saw(by_dns).exit(4) == ip_address(ISP_RESOLVER)  # nobody else tells, and nothing was seen amiss
    assert saw(by_dns, intercepted=True).exit(4) is None
    assert saw(by_dns, canary(EXIT, target="trace"), intercepted=True).exit(4) == ip_address(EXIT)
    assert saw(by_dns, canary(EXIT, target="trace")).exit(4) == ip_address(EXIT)  # led elsewhere for these two alone
    assert saw(by_dns, canary(EXIT, target="echo")).exit(4) == ip_address(EXIT)


def test_a_forwarder_that_leads_names_home_is_no_exit_of_the_vpns() -> None:
    """DNAT of all DNS: the canary that asks a nameserver and the lookups come out at the same address."""
    dns = (asked(ISP_RESOLVER, server="192.168.1.1", path=Path.OUTSIDE),)
    found = judge(saw(canary(ISP_RESOLVER, target="cloudflare"), dns=dns, intercepted=True), UNDECLARED)
    assert found.state is State.LEAKING
    assert Code.DNS_LEAK in {f.code for f in found.findings}


def test_the_address_that_a_forging_resolver_gives_a_whoami_name_is_no_egress() -> None:
    beside = asked(STRANGER, server="192.168.1.1", path=Path.OUTSIDE)
    forged = replace(saw(EXIT, dns=(beside,)), dns_rewritten=True, system_lookup=comes_out(ISP_RESOLVER))
    found = judge(forged, POLICY)
    assert found.state is State.PROTECTED
    assert {Code.DNS_REWRITTEN, Code.RESOLVER_UNKNOWN} <= {f.code for f in found.findings}
    assert judge(replace(forged, dns_rewritten=False), POLICY).state is State.LEAKING


@pytest.mark.parametrize("method", ["canary", "google"])
def test_what_a_text_tells_of_a_forging_resolver_still_counts(method: str) -> None:
    """Our own server's answer is signed, and providers that sell mistyped names make up addresses, no texts."""
    told = replace(asked(ISP_RESOLVER, server="192.168.1.1", path=Path.OUTSIDE), method=method)
    found = judge(replace(saw(EXIT, dns=(told,)), dns_rewritten=True), POLICY)
    assert found.state is State.LEAKING
