"""What to do fits the cause: each cause has advice of its own, and it names what the owner has to look at."""

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from vpn_sentinel.domain.advice import advice
from vpn_sentinel.domain.judge import judge, judge_reference
from vpn_sentinel.domain.observation import (
    Answer,
    Canary,
    Escape,
    Link,
    Observation,
    Path,
    Place,
    Probe,
    Quality,
    ResolverSighting,
    Routed,
    SystemLookup,
    Trigger,
)
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import MEANING, Code, Finding
from vpn_sentinel.wire.rest import StoredFinding

EXIT, HOME, ISP = ip_address("146.70.1.2"), ip_address("91.10.20.30"), ip_address("91.11.0.53")
POLICY = Policy(home_networks=(ip_network("91.10.20.0/24"),))


def test_a_tunnel_by_word_alone_is_advised_on_the_word() -> None:
    link = Link(name="eth0", present=True, up=True, declared=True)
    seen = Observation(trigger=Trigger.TIMER, link=link, canaries=(canary(str(EXIT)),))
    (finding,) = judge(seen, Policy()).findings
    assert finding.code is Code.TUNNEL_UNSEEN
    assert "VPN_SENTINEL_TUNNEL_INTERFACE, or leave that out" in finding.advice


def canary(address: str | None, path: Path = Path.TUNNEL, **facts: object) -> Canary:
    answer = Answer.ANSWERED if address else Answer.LOST
    made = Canary(
        probe=Probe.DEFAULT, target="echo", family=4, answer=answer, path=path,
        address=ip_address(address) if address else None,
    )  # fmt: skip
    return replace(made, **facts)  # type: ignore[arg-type]


WELL = Observation(trigger=Trigger.TIMER, link=Link(name="wg0", present=True, up=True), canaries=(canary(str(EXIT)),))
AT_HOME = replace(WELL, canaries=(canary(str(HOME), Path.OUTSIDE),))


def asked(nameserver: str, egress: str | None, path: Path, **facts: Any) -> Observation:
    sighting = ResolverSighting(
        method="canary", nameserver=ip_address(nameserver), answer=Answer.ANSWERED, path=path,
        egress=ip_address(egress) if egress else None, **facts,
    )  # fmt: skip
    places = (Place(ip=HOME, source="a", asn=3320), Place(ip=ip_address("91.10.20.0"), source="a", asn=3320),
              Place(ip=ISP, source="a", asn=3320), Place(ip=EXIT, source="a", asn=9009))  # fmt: skip
    return replace(WELL, resolvers=(sighting,), places=places)


def left(destination: str, port: int | None, protocol: str = "tcp", path: Path = Path.OUTSIDE) -> Observation:
    escape = Escape(
        interface="eth0", protocol=protocol, source=ip_address("172.17.0.2"), destination=ip_address(destination),
        destination_port=port, path=path,
    )  # fmt: skip
    return replace(WELL, escapes=(escape,))


def routed(share: float, only: str = "", inside: float | None = None) -> Observation:
    part = Routed(interface="eth0", family=4, share=share, networks=(ip_network("128.0.0.0/1"),), only=only)
    whole = Routed(interface="wg0", family=4, share=1.0 - share if inside is None else inside)
    return replace(WELL, routed=(whole, part))


def beside(*ways: tuple[str, Answer]) -> Observation:
    more = (
        canary("91.10.20.30" if a is Answer.ANSWERED else None, probe=Probe.PHYSICAL, interface=i, answer=a)
        for i, a in ways
    )
    return replace(WELL, canaries=(*WELL.canaries, *more))


CAUSES = {
    "ip_leak, a living tunnel": (AT_HOME, Code.IP_LEAK, "It is up, and traffic does not take it"),
    "ip_leak, a dead tunnel": (
        replace(AT_HOME, link=Link(name="wg0", present=True, up=False)), Code.IP_LEAK, "bring it back up",
    ),
    "ip_leak, a tunnel that is gone": (
        replace(AT_HOME, link=Link(name="wg0", present=False, up=False)), Code.IP_LEAK, "bring it back up",
    ),
    "dns_leak by the LAN's router": (
        asked("192.168.1.1", str(ISP), Path.OUTSIDE), Code.DNS_LEAK, "The router or forwarder at 192.168.1.1",
    ),
    "dns_leak by a forwarder on the own link": (
        asked("172.17.0.1", "80.58.184.30", Path.OUTSIDE), Code.DNS_LEAK, "close port 53 to the local network",
    ),
    "dns_leak by a link-local router": (
        asked("fe80::1", "80.58.184.30", Path.OUTSIDE), Code.DNS_LEAK, "The router or forwarder at fe80::1",
    ),
    "dns_leak by a forwarder on this host": (
        asked("127.0.0.11", str(HOME), Path.LOCAL), Code.DNS_LEAK, "The forwarder on this host, 127.0.0.11",
    ),
    "dns_leak by the provider's resolver beside the tunnel": (
        asked(str(ISP), str(ISP), Path.OUTSIDE), Code.DNS_LEAK, f"Route {ISP} through the tunnel",
    ),
    "dns_leak by the provider's resolver through the tunnel": (
        asked("10.64.0.1", str(ISP), Path.TUNNEL), Code.DNS_LEAK, "10.64.0.1",
    ),
    "dns_leak by a packet": (left("9.9.9.9", 53), Code.DNS_LEAK, "Route 9.9.9.9 through the tunnel"),
    "dns_leak by TLS": (left("9.9.9.9", 853), Code.DNS_LEAK, "DNS over TLS"),
    "dns_leak by TLS over IPv6": (left("2620:fe::fe", 853), Code.DNS_LEAK, "[2620:fe::fe]:853"),
    "dns_leak by what resolv.conf does not name": (
        replace(WELL, system_lookup=SystemLookup(answer=Answer.ANSWERED, egress=(HOME,))), Code.DNS_LEAK,
        "nsswitch.conf",
    ),
    "dns_leak by a rule for its port": (
        routed(1.0, "UDP to port 53", inside=1.0), Code.DNS_LEAK, "Remove the rule (ip rule) that sends UDP to port 53",
    ),
    "dns_leak by a rule for its port, as a lookup shows it": (
        replace(
            asked("1.1.1.1", None, Path.OUTSIDE), routed=routed(1.0, "UDP to port 53", inside=1.0).routed
        ), Code.DNS_LEAK, "sends UDP to port 53 by eth0, past",
    ),
    "dns_leak by a program that is bound to a device": (
        left("9.9.9.9", 53, path=Path.TUNNEL), Code.DNS_LEAK,
        "Routes send 9.9.9.9 through wg0, and it left by eth0 all the same",
    ),
    "dns_leak by a public resolver that is asked from home": (
        asked("8.8.8.8", None, Path.UNKNOWN, client=HOME), Code.DNS_LEAK, "Route 8.8.8.8 through the tunnel",
    ),
    "dns_leak by a client subnet": (
        asked("8.8.8.8", None, Path.TUNNEL, subnet=ip_network("91.10.20.0/24")), Code.DNS_LEAK, "EDNS client subnet",
    ),
    "split_route by a packet of ICMP": (
        left("203.0.113.9", None, "icmp"), Code.SPLIT_ROUTE, "ss -wnp; tcpdump -ni eth0 host 203.0.113.9",
    ),
    "split_route by a program that is bound to a device": (
        left("203.0.113.9", 443, path=Path.TUNNEL), Code.SPLIT_ROUTE,
        "is bound to eth0 or its address",
    ),
    "leak_watch_off where it is not permitted": (
        replace(WELL, leak_watch=False, watch_refused="Operation not permitted"), Code.LEAK_WATCH_OFF,
        "Give the agent CAP_NET_RAW",
    ),
    "leak_watch_off for another cause": (
        replace(WELL, leak_watch=False, watch_refused=""), Code.LEAK_WATCH_OFF, "See in the agent's log why",
    ),
    "mtu_blackhole where a size passes": (
        replace(WELL, quality=Quality(seconds=5, sent=9, lost=0, vanished=1420, mtu=1300)), Code.MTU_BLACKHOLE,
        "to 1300, which passes",
    ),
    "mtu_blackhole where none is known": (
        replace(WELL, quality=Quality(seconds=5, sent=9, lost=0, vanished=1420)), Code.MTU_BLACKHOLE,
        "until large packets pass",
    ),
    "no_network with lo alone": (
        Observation(trigger=Trigger.TIMER, interfaces=(), canaries=(canary(None, answer=Answer.UNREACHABLE),)),
        Code.NO_NETWORK, "Attach this container",
    ),
    "nothing_seen where a round could not be made": (
        replace(WELL, broken="the disk is full"), Code.NOTHING_SEEN, "keeps the agent from probing",
    ),
    "split_route by routes": (routed(0.43), Code.SPLIT_ROUTE, "Remove what leads past the tunnel by eth0"),
    "split_route by a rule": (routed(0.43, "TCP to port 443"), Code.SPLIT_ROUTE, "sends TCP to port 443 past"),
    "split_route by a balanced route": (routed(1.0, inside=1.0), Code.SPLIT_ROUTE, "Take eth0 out of the routes"),
    "split_route by a packet": (left("203.0.113.9", 443), Code.SPLIT_ROUTE, "sends to 203.0.113.9:443 (ss -tunp)"),
    "killswitch_open by one way": (beside(("eth1", Answer.ANSWERED)), Code.KILLSWITCH_OPEN, "leaks by eth1"),
    "killswitch_open as far as the router": (
        replace(WELL, canaries=(*WELL.canaries, canary(
            "192.168.1.1", probe=Probe.FIRST_HOP, interface="eth0", answer=Answer.EXPIRED,
        ))), Code.KILLSWITCH_OPEN, "If 192.168.1.1 is yours and lets nothing but the VPN pass",
    ),
    "killswitch_open by one of two": (
        beside(("eth0", Answer.BLOCKED), ("eth1", Answer.ANSWERED)), Code.KILLSWITCH_OPEN,
        "holds eth0 and not eth1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("seen", "code", "words"), CAUSES.values(), ids=CAUSES.keys())
def test_advice_fits_its_cause(seen: Observation, code: Code, words: str) -> None:
    (found,) = [f for f in judge(seen, POLICY).findings if f.code is code]
    assert words in found.advice
    # What a server stored of it is advised on alike.
    assert StoredFinding(code=found.code, evidence=dict(found.evidence)).full().advice == found.advice


def test_each_cause_of_a_code_has_its_own() -> None:
    said: dict[str, list[str]] = {}
    for name, (seen, code, _) in CAUSES.items():
        (found,) = [f for f in judge(seen, POLICY).findings if f.code is code]
        said.setdefault(found.advice, []).append(name)
    alike = [names for names in said.values() if len(names) > 1]
    assert alike == [
        ["ip_leak, a dead tunnel", "ip_leak, a tunnel that is gone"],
        ["dns_leak by a rule for its port", "dns_leak by a rule for its port, as a lookup shows it"],
    ]


def test_a_balanced_default_is_not_all_of_the_traffic() -> None:
    (found,) = [f for f in judge(routed(1.0, inside=1.0), POLICY).findings if f.code is Code.SPLIT_ROUTE]
    assert "%" not in found.message
    assert "share" not in found.evidence
    assert found.message == (
        "Routes send some connections to 128.0.0.0/1 past the tunnel by eth0, and others through it."
    )


def test_routes_past_the_tunnel_are_said_with_the_address_that_the_internet_sees() -> None:
    """Who looks it up, or takes a capture, finds it; where nobody saw one, none is made up."""
    seen = replace(routed(0.43), canaries=(*WELL.canaries, *beside(("eth0", Answer.ANSWERED)).canaries))
    for found, told in ((judge(seen, POLICY).findings, True), (judge(routed(0.43), POLICY).findings, False)):
        (routes,) = [f for f in found if f.code is Code.SPLIT_ROUTE and f.evidence.get("seen_by") == "routing tables"]
        assert routes.message.endswith("What leaves there comes out at 91.10.20.30.") is told
        assert (routes.evidence.get("comes_out_at") == "91.10.20.30") is told


def test_nothing_is_said_to_be_unreachable_when_no_answer_came() -> None:
    seen = Observation(trigger=Trigger.TIMER, canaries=(canary(None), canary(None)))
    (found,) = judge(seen, POLICY).findings
    assert found.code is Code.NO_NETWORK
    assert "reachable" not in found.message + found.advice
    assert found.advice.startswith("No answer came")


def test_a_firewall_that_refuses_this_programs_packets_is_said_and_proves_nothing_of_others() -> None:
    refused = Observation(trigger=Trigger.TIMER, canaries=(canary(None, answer=Answer.BLOCKED),) * 2)
    (found,) = judge(refused, POLICY).findings
    assert found.code is Code.NO_NETWORK
    assert "refuses what this program sends" in found.message
    assert "other users' programs" in found.message


@pytest.mark.parametrize("gateway", [Answer.ANSWERED, Answer.LOST])
def test_a_firewall_that_lets_nothing_into_a_tunnel_that_is_up_is_said(gateway: Answer) -> None:
    refused = canary(None, answer=Answer.BLOCKED), canary(None, answer=Answer.UNREACHABLE, family=6)
    asked = canary(None, probe=Probe.GATEWAY, answer=gateway)
    link = Link(name="wg0", present=True, up=True)
    (found,) = judge(Observation(trigger=Trigger.TIMER, link=link, canaries=(*refused, asked)), POLICY).findings
    assert found.code is Code.NO_TRAFFIC
    assert "this host refuses what this program sends into it" in found.message
    assert "firewall" in found.advice
    lost = Observation(trigger=Trigger.TIMER, link=link, canaries=(*refused, canary(None, answer=Answer.LOST)))
    assert "nothing comes back" in judge(lost, POLICY).findings[0].message  # one that went out tells more


def test_a_namespace_with_nothing_but_lo_is_called_so() -> None:
    alone = Observation(trigger=Trigger.TIMER, interfaces=(), canaries=(canary(None, answer=Answer.UNREACHABLE),))
    (found,) = judge(alone, POLICY).findings
    assert found.code is Code.NO_NETWORK
    assert "Only the loopback interface is here" in found.message


def test_silence_by_either_way_does_not_blame_the_home_connection_alone() -> None:
    canaries = (canary(None), replace(canary(None), probe=Probe.PHYSICAL, path=Path.OUTSIDE))
    link = Link(name="wg0", present=True, up=True)
    (found,) = judge(Observation(trigger=Trigger.TIMER, link=link, canaries=canaries), POLICY).findings
    assert found.code is Code.UPLINK_DOWN
    assert "may be down, or a firewall" in found.message


def test_a_resolver_at_fault_is_named_as_such_only_where_it_is() -> None:
    """8.8.8.8 that is asked from home, or passes home on, passes nothing on to anybody's provider."""
    for sighting in ({"client": HOME}, {"subnet": ip_network("91.10.20.0/24")}):
        (found,) = judge(asked("8.8.8.8", None, Path.UNKNOWN, **sighting), POLICY).findings
        assert "provider" not in found.advice
    (by_rule,) = judge(routed(1.0, "UDP to port 53", inside=1.0), POLICY).findings
    assert "nameserver" not in by_rule.advice


def test_a_reference_agent_behind_a_tunnel_is_told_to_move() -> None:
    (found,) = judge_reference(WELL).findings
    assert "outside the tunnel's network" in found.advice
    assert "could be sent" not in found.advice


def test_intercepted_dns_is_not_said_to_be_the_tunnels_doing() -> None:
    for link in (WELL.link, None):
        seen = replace(WELL, dns_intercepted=True, link=link)
        (found,) = [f for f in judge(seen, POLICY).findings if f.code is Code.DNS_INTERCEPTED]
        assert "inside the tunnel" not in found.message + found.advice
        assert "nft list ruleset" in found.advice


@pytest.mark.parametrize(("verdict", "words"), [("leaking", "Traffic beside"), ("degraded", "The tunnel works")])
def test_what_comes_and_goes_is_not_always_the_tunnel(verdict: str, words: str) -> None:
    said = Finding(Code.FLAPPING, "It is so.", {"verdict": verdict}).advice
    assert said.startswith(words)
    assert "another VPN server" not in said


@pytest.mark.parametrize("code", Code)
@pytest.mark.parametrize(
    "facts",
    [
        {}, {"nameserver": "", "destination": "", "interfaces": "", "interface": ""}, {"nameserver": "junk"},
        {"seen_by": "routing tables"}, {"seen_by": "routing tables", "also_by": "wg0"},
        {"seen_by": "routing tables", "traffic": "UDP"}, {"seen_by": "leak watch"}, {"tunnel": "?"}, {"held": "eth0"},
    ],
)  # fmt: skip
def test_with_whatever_facts_advice_is_a_sentence(code: Code, facts: dict[str, str]) -> None:
    said = Finding(code, "It is so.", facts).advice
    assert said.endswith(".")
    assert not any(wrong in said for wrong in ("None", "  ", "()", "''", " .", " ,", ".."))
    assert advice(code, facts) or said == MEANING[code].advice
