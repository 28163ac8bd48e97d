"""The DNS canary in the lab: the server answers for a zone that is delegated to it, and nobody else is asked.

Two tunnels report to one server, WireGuard and OpenVPN; the names of strangers that tell who asks are blocked, so all
that is known of resolvers comes from the zone. A third tunnel has rounds as rare as by default.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lab import Lab, Site, plan, until
from tests.acceptance.stand import Stand

pytestmark = pytest.mark.acceptance

ZONE = plan.CANARY_ZONE
STRANGERS = ("o-o.myaddr.l.google.com", "whoami.ds.akahelp.net", "whoami.akamai.net")
DNS_LEAK = 10.0  # seconds to the verdict, without any capability
SITES = {"wire": ("wireguard", "nl"), "open": ("openvpn", "ch"), "calm": ("wireguard", "us")}

Stands = dict[str, Stand]


@pytest.fixture(scope="module")
def stands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stands]:
    folder = tmp_path_factory.mktemp("dns")
    with ExitStack() as ends:
        sites = [Site(name, vpn=kind, provider=at, kill_switch=False) for name, (kind, at) in SITES.items()]
        lab = ends.enter_context(Lab(sites))
        made = {name: Stand(lab, name, number, folder) for number, name in enumerate(SITES)}
        first = made["wire"]
        first.server_settings |= {
            "VPN_SENTINEL_CANARY_ZONE": ZONE,
            "VPN_SENTINEL_CANARY_NS": f"ns.{lab.server_name}",
            "VPN_SENTINEL_GRACE_RECOVERY": "1",
        }
        first.start_server()
        for resolver in lab.resolvers.values():
            resolver.refuse(frozenset(STRANGERS))  # beside the sites' own faults: healing leaves it
        for stand in made.values():
            stand.port = first.port
            stand.agent_settings |= {"VPN_SENTINEL_URL": first.url}
            ends.callback(stand.stop)
        made["calm"].agent_settings |= {"VPN_SENTINEL_INTERVAL": "30"}
        for stand in made.values():
            stand.start_agent()
        for stand in made.values():
            stand.wait_state("protected", 30)
        for name in SITES:
            by_canary(made[name], 30)
        yield made


def last(stand: Stand) -> dict[str, Any]:
    """The newest observation that asked nameservers."""
    found = stand.observations(time.time() - 120, time.time() + 60)
    return next((o["body"] for o in found if o["body"].get("resolvers")), {})  # newest first


def egresses(stand: Stand, seen: dict[str, Any] | None = None) -> set[tuple[str, str]]:
    """Method and egress of each sighting that told one."""
    sightings = (last(stand) if seen is None else seen).get("resolvers", [])
    return {(s["method"], s["egress"]) for s in sightings if s.get("egress")}


def by_canary(stand: Stand, limit: float) -> set[tuple[str, str]]:
    def found() -> set[tuple[str, str]] | None:
        told = egresses(stand)
        return told if any(method == "canary" for method, _ in told) else None

    return until(found, limit, f"a canary of {stand.name}; last {last(stand)}", interval=0.1) or set()


def pair(stands: Stands) -> list[Stand]:
    return [stands["wire"], stands["open"]]


def well(*stands: Stand) -> None:
    for stand in stands:
        stand.site.heal()
    for stand in stands:
        stand.wait_state("protected", 30)
        until(lambda s=stand: not s.codes() & {"dns_leak", "dns_intercepted", "dns_rewritten"}, 30, "all well")


def leak(stands: list[Stand], fault: Callable[[Stand], object]) -> list[dict[str, str]]:
    """Apply `fault` to all; each is *leaking* by `dns_leak` in time. Returns the evidence of each."""
    well(*stands)
    began = {}
    for stand in stands:
        began[stand.name] = time.time()
        fault(stand)
    told = []
    for stand in stands:
        until(lambda s=stand: "dns_leak" in s.codes(), DNS_LEAK + 2, f"a DNS leak of {stand.name}: {stand.status()}")
        took = time.time() - began[stand.name]
        print(f"{stand.name}: a DNS leak was told after {took:.1f} s")
        assert took < DNS_LEAK
        status = stand.status()
        assert status["state"] == "leaking"
        assert not {f["code"] for f in status["findings"]} & {"ip_leak", "ipv6_leak"}
        # A packet that was seen to leave tells it first; the lookups of the round behind it add who resolves.
        told.append(until(lambda s=stand: by_lookup(evidence(s)), DNS_LEAK, f"who resolves for {stand.name}"))
    return told


def by_lookup(facts: dict[str, str]) -> dict[str, str]:
    """The facts, where a lookup is among what told them: a further packet may tell of itself alone again."""
    return facts if "nameserver" in facts else {}


def evidence(stand: Stand) -> dict[str, str]:
    return next((f["evidence"] for f in stand.status()["findings"] if f["code"] == "dns_leak"), {})


def dig(stand: Stand, *words: str) -> str:
    return str(stand.site.run(["dig", "+time=3", "+tries=1", *words]).stdout)


def test_the_zone_is_served_to_resolvers_and_nothing_else_is(stands: Stands) -> None:
    stand = stands["wire"]
    assert f"ns.{stand.lab.server_name}." in dig(stand, "+short", "SOA", ZONE)  # through the tunnel's unbound
    assert dig(stand, "+short", "NS", ZONE).strip() == f"ns.{stand.lab.server_name}."
    assert "NXDOMAIN" in dig(stand, f"www.{ZONE}")
    for server in (stand.lab.server4, stand.lab.server6):
        assert "NOERROR" in dig(stand, "+tcp", "SOA", ZONE, f"@{server}")
        for transport in ("+tcp", "+notcp"):
            answer = dig(stand, transport, "www.example.com", f"@{server}")
            assert "REFUSED" in answer
            assert "ANSWER: 0, AUTHORITY: 0" in answer
    assert "BADVERS" in dig(stand, "+edns=1", "+noednsnegotiation", "SOA", ZONE, f"@{stand.lab.server4}")
    metrics = stand.lab.http("srv", "GET", f"http://127.0.0.1:{stand.health}/metrics").text
    assert float(re.findall(r'canary_queries_total\{outcome="sighted"\} (\S+)', metrics)[0]) > 0
    ready = stand.lab.http("srv", "GET", f"http://127.0.0.1:{stand.health}/health/ready").json()
    assert ready["parts"]["canary"] == {"ok": True}


def test_no_datagram_is_answered_by_a_larger_one(stands: Stands) -> None:
    stand = stands["wire"]
    with stand.lab.capture("srv", "udp port 53", interface="eth0") as wire:
        for kind in ("SOA", "NS", "ANY", "TXT"):
            dig(stand, "+ignore", "+noedns", kind, ZONE, f"@{stand.lab.server4}")
            dig(stand, "+ignore", "+bufsize=4096", kind, f"www.{ZONE}", f"@{stand.lab.server4}")
        until(lambda: len(wire.packets()) > 24, 20, "questions of agents as well")
    asked: dict[tuple[str, int | None, str], int] = {}
    answered = 0
    for packet in wire.packets():
        ident, size = packet.text.split()[0].rstrip("*+-|$%"), int(packet.text.rsplit("(", 1)[1].rstrip(")"))
        if packet.dport == 53:
            asked[packet.src, packet.sport, ident] = size
        elif (key := (packet.dst, packet.dport, ident)) in asked:
            answered += 1
            assert size <= asked[key], packet
    assert answered > 10


def test_row_23_the_resolver_is_known_without_any_third_party(stands: Stands) -> None:
    for stand in pair(stands):
        home = stand.site.line.provider
        assert home is not None
        assert by_canary(stand, 10) == {("canary", home.resolver_egress)}
        assert stand.status()["state"] == "protected"
        assert not stand.codes() & {"resolver_unknown", "resolver_unexpected", "dns_intercepted", "dns_rewritten"}
        assert last(stand)["dns_rewritten"] is False


def test_row_15_resolver_outside_the_tunnel(stands: Stands) -> None:
    for facts in leak(pair(stands), lambda s: s.site.resolver_outside()):
        assert facts["resolver"] == plan.ISP_RESOLVER_EGRESS
        assert facts["seen_by"] == "a lookup of a name of the server's own zone"


def test_row_16_forwarder_on_the_lan(stands: Stands) -> None:
    for facts in leak(pair(stands), lambda s: s.site.lan_forwarder()):
        assert facts["resolver"] == plan.ISP_RESOLVER_EGRESS
        assert facts["nameserver"].startswith("192.168.")


def test_row_18_public_resolver_outside_the_tunnel(stands: Stands) -> None:
    for facts in leak(pair(stands), lambda s: s.site.public_outside()):
        assert facts["nameserver"] == plan.CLOUDFLARE


def test_row_20_one_of_two_resolvers_leaks(stands: Stands) -> None:
    for facts in leak(pair(stands), lambda s: s.site.two_resolvers_one_leaks()):
        assert facts["resolver"] == plan.ISP_RESOLVER_EGRESS


def test_row_21_interception_is_told_from_a_leak(stands: Stands) -> None:
    some = pair(stands)
    well(*some)
    for stand in some:
        stand.site.transparent_proxy("provider")
    for stand in some:
        until(lambda s=stand: "dns_intercepted" in s.codes(), DNS_LEAK, "an interception")
        assert stand.status()["state"] == "protected"

    def diverted(stand: Stand) -> None:
        stand.site.transparent_proxy("home")
        stand.site.public_outside()

    for facts in leak(some, diverted):
        assert facts["resolver"] == plan.ISP_RESOLVER_EGRESS


def test_an_answer_in_our_name_is_an_interception(stands: Stands) -> None:
    stand = stands["wire"]
    well(stand)
    resolver = stand.lab.resolvers["nl"]
    resolver._control("local_zone", ZONE, "redirect")
    resolver._control("local_data", ZONE, "TXT", plan.ISP_RESOLVER_EGRESS, "0123456789abcdef")
    try:
        until(lambda: "dns_intercepted" in stand.codes(), DNS_LEAK, "an interception")
        assert stand.status()["state"] == "protected"
        assert plan.ISP_RESOLVER_EGRESS not in {egress for _, egress in egresses(stand)}
    finally:
        resolver._control("local_zone_remove", ZONE)
    well(stand)


def test_names_that_do_not_exist_are_given_an_address(stands: Stands) -> None:
    some = pair(stands)
    well(*some)
    for stand in some:
        stand.site.rewrite_names()
    for stand in some:
        until(lambda s=stand: "dns_rewritten" in s.codes(), DNS_LEAK, "rewriting")
        assert stand.status()["state"] == "protected"
        assert not stand.codes() & {"dns_leak", "dns_intercepted"}
    well(*some)


def test_a_resolver_that_strays_between_two_rounds_is_noticed(stands: Stands) -> None:
    """Rounds are 30 s apart here; neither routes nor resolv.conf change, only where the nameserver's path ends."""
    stand = stands["calm"]
    stand.wait_state("protected", 30)  # not healed: that alone would start a round
    provider = stand.site.line.provider
    assert provider is not None
    node, (inner, _) = stand.lab.node(provider.name), stand.site.line.inner
    began = time.time()
    node.nft("stray", STRAY.format(inner=inner, resolver=provider.resolver4, to=plan.ISP_RESOLVER))
    try:
        stand.wait_state("leaking", DNS_LEAK)
        took = time.time() - began
        assert "dns_leak" in stand.codes()
        assert took < DNS_LEAK
        print(f"a straying resolver was told after {took:.1f} s")
    finally:
        node.nft("stray", "")


STRAY = """
  chain stray {{
    type nat hook prerouting priority -150; policy accept;
    ip saddr {inner} ip daddr {resolver} udp dport 53 dnat ip to {to}
  }}
"""
