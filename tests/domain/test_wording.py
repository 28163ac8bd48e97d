"""Every sentence that people read, with each optional fact there and missing: no "None", no empty quotes, no double
space, no "peer(s)". Every code of the catalogue is read, and what is never read fails."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from ipaddress import ip_address, ip_network
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.domain.test_verdict import CASES, POLICY
from vpn_sentinel.domain.judge import judge, judge_reference
from vpn_sentinel.domain.machine import Memory, advance, silence_finding
from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.domain.observation import (
    Answer,
    Canary,
    Claim,
    Escape,
    Link,
    Observation,
    Path,
    PortCheck,
    Probe,
    Quality,
    ResolverSighting,
    Routed,
    SystemLookup,
    Trigger,
)
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import MEANING, Code, Finding, State, Verdict
from vpn_sentinel.server.notify.channels.webhook import body, short_body
from vpn_sentinel.server.notify.text import explain, html, plain
from vpn_sentinel.server.tracking.enrichment import transport_findings

ADDRESS, ADDRESS6 = ip_address("146.70.1.2"), ip_address("2001:db8::7")
_WRONG = re.compile(r"\(s\)|\bNone\b(?! of )|\"\"|''|``|  |\(\)| [.,;:]|^\s|\s$")


def wrong(text: str) -> bool:
    return not text or any(_WRONG.search(line) for line in text.split("\n"))


def texts(verdict: Verdict) -> Iterator[str]:
    for finding in verdict.findings:
        yield finding.message
        yield finding.advice
        yield from finding.evidence.values()


_bare = st.builds(
    Canary,
    probe=st.sampled_from(Probe),
    target=st.just("echo"),
    family=st.sampled_from([4, 6]),
    answer=st.sampled_from(Answer),
    path=st.sampled_from(Path),
    address=st.sampled_from([None, None, ADDRESS]),
)
_links = st.sampled_from([None, *(Link(name="wg0", present=p, up=u) for p, u in product((True, False), repeat=2))])
_resolvers = st.builds(
    ResolverSighting,
    method=st.just("whoami"),
    nameserver=st.just(ADDRESS),
    answer=st.sampled_from(Answer),
    path=st.sampled_from(Path),
    egress=st.sampled_from([None, ADDRESS]),
)
_escapes = st.sampled_from([
    Escape(interface="eth0", protocol=protocol, source=source, destination=source, destination_port=port)
    for protocol in ("udp", "132") for source in (ADDRESS, ADDRESS6) for port in (None, 53, 853)
])  # fmt: skip
_seen = st.builds(
    Observation,
    trigger=st.sampled_from([Trigger.TIMER, Trigger.KEEPALIVE, Trigger.PULSE]),
    link=_links,
    interfaces=st.sampled_from([None, (), ("eth0",)]),
    canaries=st.lists(_bare, max_size=4).map(tuple),
    resolvers=st.lists(_resolvers, max_size=2).map(tuple),
    escapes=st.lists(_escapes, max_size=2).map(tuple),
    claims=st.sampled_from([(), (Claim(source="gluetun"),)]),
    quality=st.sampled_from([None, Quality(seconds=5.0, sent=60, lost=60, vanished=1400)]),
    forwarded_port=st.just(4000),
    port_check=st.sampled_from([None, PortCheck(address=ADDRESS, port=4000, answer=Answer.LOST)]),
    portal=st.sampled_from([None, True]),
    dns_intercepted=st.sampled_from([None, True]),
    dns_rewritten=st.sampled_from([None, True]),
    reported_from=st.sampled_from([None, ADDRESS]),
    unheard=st.sampled_from([None, True]),
    leak_watch=st.sampled_from([None, False]),
    system_lookup=st.sampled_from(
        [None, *(SystemLookup(answer=a, egress=e) for a in Answer for e in ((), (ADDRESS,)))]
    ),
    routed=st.sampled_from(
        [
            None,
            *(
                (
                    Routed(interface="wg0", family=4, share=inside),
                    Routed(interface="eth0", family=4, share=share, only=only),
                )
                for inside in (0.5, 1.0)
                for share in (0.001, 0.5, 1.0)
                for only in ("", "UDP")
            ),
        ]
    ),
)


_POLICIES = (Policy(), POLICY)


@settings(deadline=None, max_examples=1000)
@given(_seen, st.sampled_from(_POLICIES))
def test_a_finding_reads_well_whatever_is_not_known(seen: Observation, policy: Policy) -> None:
    for text in (*texts(judge(seen, policy)), *texts(judge_reference(seen))):
        assert not wrong(text), text


@given(seen=_seen, policy=st.sampled_from(_POLICIES))
@settings(max_examples=400, deadline=None)
def test_what_is_not_known_is_left_out_of_the_facts(seen: Observation, policy: Policy) -> None:
    for finding in judge(seen, policy).findings:
        assert not [v for v in finding.evidence.values() if "unknown" in v or v == "not told"], finding


def without_one(value: Any) -> Iterator[Any]:
    """The same with one fact less, however deep it lies: each that may be missing in turn."""
    for field in fields(value):
        held, usual = getattr(value, field.name), field.default
        if usual is not MISSING and held != usual:
            yield replace(value, **{field.name: usual})
        for n, one in enumerate(held if isinstance(held, tuple) else (held,)):
            for less in without_one(one) if is_dataclass(one) else ():
                yield replace(value, **{field.name: (*held[:n], less, *held[n + 1 :]) if held is not one else less})


_UP = Link(name="wg0", present=True, up=True, rx_bytes=7, tx_bytes=9)
_LOST = Canary(probe=Probe.DEFAULT, target="echo", family=4, answer=Answer.LOST)
_DEAD = Observation(trigger=Trigger.TIMER, link=_UP, canaries=(_LOST,))
_HOP = Canary(
    probe=Probe.FIRST_HOP, target="x", family=4, answer=Answer.EXPIRED, interface="eth0",
    address=ip_address("192.168.1.1"),
)  # fmt: skip
_HELD = Canary(probe=Probe.PHYSICAL, target="echo", family=4, answer=Answer.BLOCKED, interface="eth1")
_OUT = replace(_HELD, answer=Answer.ANSWERED, address=ip_address("91.10.20.30"), interface="eth0")
_THROUGH = replace(_LOST, answer=Answer.ANSWERED, path=Path.TUNNEL, address=ADDRESS)
_WELL = replace(_DEAD, canaries=(_THROUGH,))
_NETWORKS = tuple(ip_network(f"5.{n}.0.0/16") for n in range(6))
_BYPASS = Routed(
    interface="eth0", family=4, share=0.1, networks=_NETWORKS, more=2, only="TCP to port 443",
    asked=ip_address("5.0.0.1"), answer=Answer.EXPIRED,
)  # fmt: skip
_CLAIMS = (Claim(source="gluetun", status="running"), Claim(source="wireguard", handshake_age=4000.0))
_GATEWAY = replace(_LOST, probe=Probe.GATEWAY, target="10.64.0.1", answer=Answer.ANSWERED)
# Beside the cases of the judge, which every code has one of: facts that none of those holds.
_MORE = (
    replace(_DEAD, broken="the disk is full"),
    replace(_DEAD, canaries=(), refused_user=997),
    replace(_DEAD, claims=_CLAIMS),
    replace(_DEAD, canaries=(_LOST, _GATEWAY), claims=_CLAIMS),
    replace(_DEAD, link=None, interfaces=(), canaries=(replace(_LOST, answer=Answer.BLOCKED),)),
    replace(_DEAD, link=None, canaries=(replace(_LOST, answer=Answer.BLOCKED),)),
    replace(_WELL, canaries=(_THROUGH, _HOP, _HELD)),
    replace(_WELL, canaries=(_THROUGH, _OUT, _HELD)),
    replace(_WELL, canaries=(_THROUGH, _OUT), routed=(Routed(interface="wg0", family=4, share=1.0), _BYPASS)),
    replace(
        _WELL,
        routed=(Routed(interface="wg0", family=4, share=0.9), replace(_BYPASS, only="UDP to port 53")),
        escapes=(
            Escape(interface="eth0", protocol="udp", source=ADDRESS, destination=ip_address("9.9.9.9"),
                   source_port=5, destination_port=53, name="example.org"),
        ),
    ),
    replace(_WELL, leak_watch=False, watch_refused="Operation not permitted"),
    replace(_WELL, leak_watch=False, watch_refused=""),
    replace(_WELL, dns_intercepted=True, resolvers=()),
    replace(_WELL, dns_intercepted=True, link=None),
)  # fmt: skip


def _elsewhere() -> Iterator[Finding]:
    """What the machine and the receiver of reports find."""
    yield silence_finding(0.0, 16.0)
    yield silence_finding(0.0, 16.0, "madrid", ["nl-1"])
    for skew in (-61.0, 3700.0):
        yield from transport_findings(skew, 0)
    for thinned in (1, 7):
        yield from transport_findings(None, thinned, shared=True)
    for code in (Code.NO_TRAFFIC, Code.DNS_DOWN, Code.IP_LEAK):
        memory, state = Memory(), MEANING[code].state
        for n in range(4):
            for at, verdict in ((0, Verdict(State.PROTECTED)), (5, Verdict(state, (Finding(code, "It is so."),)))):
                for more in (0, 5, 20):
                    memory, _ = advance(memory, verdict, 60.0 * n + at + more, Policy())
                    yield from memory.findings


@cache
def read() -> tuple[Finding, ...]:
    """Each finding of the catalogue, with whatever may be missing missing once."""
    found = list(_elsewhere())
    cases = [(seen, (policy, *_POLICIES)) for seen, policy, *_ in CASES.values()] + [
        (seen, _POLICIES) for seen in _MORE
    ]
    for seen, policies in cases:
        for one in (seen, *without_one(seen)):
            found += judge_reference(one).findings
            found += [f for policy in policies for f in judge(one, policy).findings]
    return tuple(found)


@pytest.mark.parametrize("code", Code)
def test_each_code_is_read_and_reads_well(code: Code) -> None:
    found = [f for f in read() if f.code is code]
    assert found, f"no sentence of {code} was read"
    for finding in found:
        for text in (*texts(Verdict(State.UNKNOWN, (finding,))), explain(finding)):
            assert not wrong(text), text


# Facts of a finding that may be missing: each is read both ways.
OPTIONAL = {
    Code.IP_LEAK: ("path", "tunnel", "destination"),
    Code.IPV6_LEAK: ("path", "tunnel", "destination"),
    Code.DNS_LEAK: (
        "nameserver",
        "path",
        "resolver",
        "asn",
        "asked_from",
        "client_subnet",
        "by_rule",
        "destination",
        "name",
        "networks",
        "also",
    ),
    Code.SPLIT_ROUTE: ("address", "destination", "networks", "traffic", "share", "asked", "comes_out_at", "also_by"),
    Code.NO_TRAFFIC: ("gluetun_says", "handshake_seconds_ago", "interface"),
    Code.NO_FORWARDING: ("gluetun_says", "handshake_seconds_ago"),
    Code.UPLINK_DOWN: ("reference", "beside_the_tunnel"),
    Code.DNS_DOWN: ("nameservers", "system"),
    Code.MTU_BLACKHOLE: ("passes",),
    Code.LEAK_WATCH_OFF: ("packet_socket",),
    Code.NOTHING_SEEN: ("user", "reason"),
    Code.NO_NETWORK: ("interfaces", "refused"),
    Code.TUNNEL_UNKNOWN: ("exit", "declared", "home", "beside"),
    Code.TUNNEL_UNSEEN: ("interface", "home"),
    Code.NO_REPORTS: ("site",),
    Code.KILLSWITCH_OPEN: ("address", "router", "seen_by", "interfaces", "held"),
    Code.RESOLVER_UNEXPECTED: ("country",),
    Code.RESOLVER_UNKNOWN: ("nameservers", "path"),
}


@pytest.mark.parametrize(("code", "fact"), [(code, fact) for code, facts in OPTIONAL.items() for fact in facts])
def test_each_optional_fact_is_read_there_and_missing(code: Code, fact: str) -> None:
    assert {fact in f.evidence for f in read() if f.code is code} == {True, False}


def test_no_fact_of_a_finding_is_optional_unnoticed() -> None:
    """A fact that some findings of a code have and others have not stands in the table, or with one that does."""
    kinds: dict[Code, list[frozenset[str]]] = {}
    for finding in read():
        kinds.setdefault(finding.code, []).append(frozenset(finding.evidence))
    for code in set(Code) - set(OPTIONAL):
        answers = re.compile(r".*_ipv[46]$")
        told = {frozenset(k for k in facts if not answers.match(k)) for facts in kinds[code]}
        assert len(told) == 1 or code is Code.LOCATION_UNCERTAIN, (code, told)


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        ("47", "IP protocol 47 (GRE) to 5.9.10.20"),
        ("253", "IP protocol 253 to 5.9.10.20"),
        ("udp", "UDP to 5.9.10.20"),
    ],
)
def test_a_protocol_is_named(protocol: str, said: str) -> None:
    packet = Escape(interface="eth0", protocol=protocol, source=ADDRESS, destination=ip_address("5.9.10.20"))
    link = Link(name="wg0", present=True, up=True)
    (finding,) = judge(Observation(trigger=Trigger.LEAK, link=link, escapes=(packet,)), Policy()).findings
    assert finding.message == f"A packet left outside the tunnel: {said}."


def test_packets_that_are_meant_to_leave_are_no_word_on_the_canaries() -> None:
    """Told before any canary was sent, and found to be allowed: nobody could not send one."""
    destination = ip_address("5.9.10.20")
    packet = Escape(interface="eth0", protocol="udp", source=ADDRESS, destination=destination, destination_port=4444)
    seen = Observation(trigger=Trigger.LEAK, link=Link(name="wg0", present=True, up=True), escapes=(packet,))
    assert judge(seen, Policy(allowed_outside=(ip_network(destination),))) == Verdict(State.UNKNOWN)


def test_an_answer_beside_the_tunnel_without_an_address_says_so() -> None:
    beside = Canary(probe=Probe.PHYSICAL, target="trace", family=4, answer=Answer.ANSWERED)
    through = Canary(
        probe=Probe.DEFAULT, target="echo", family=4, answer=Answer.ANSWERED, path=Path.TUNNEL, address=ADDRESS
    )
    seen = Observation(trigger=Trigger.TIMER, link=Link(name="wg0", present=True, up=True), canaries=(through, beside))
    (finding,) = judge(seen, Policy()).findings
    assert finding.code is Code.KILLSWITCH_OPEN
    assert finding.message == "A packet sent beside the tunnel was answered by trace."
    assert finding.evidence == {"seen_by": "trace"}


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("role", ["tunnel", "reference"])
@pytest.mark.parametrize("tunnel", ["", "nl-1"])
@pytest.mark.parametrize("was", [None, State.LEAKING])
def test_a_notice_reads_well_whatever_is_not_known(kind: Kind, role: str, tunnel: str, was: State | None) -> None:
    for notice in (
        Notice(kind=kind, tunnel=tunnel, role=role, was=was),
        Notice(kind=kind, tunnel=tunnel, role=role, was=was, port=4000),
        Notice(kind=kind, tunnel=tunnel, role=role, was=was, findings=(Finding(Code.NO_TRAFFIC, "Dead.", {"x": ""}),)),
    ):
        assert not wrong(plain(notice)), plain(notice)
        assert not wrong(html(notice)), html(notice)


def strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from strings(one)
    elif isinstance(value, str) and value:
        yield value


@pytest.mark.parametrize("kind", Kind)
def test_a_webhook_reads_well_whatever_is_not_known(kind: Kind) -> None:
    bare = Notice(kind=kind, tunnel="nl-1", findings=(Finding(Code.NO_TRAFFIC, "Dead.", {"x": ""}),))
    for text in (*strings(body(bare)), *strings(short_body(bare))):
        assert not wrong(text), text


def test_silence_reads_well_with_and_without_a_site() -> None:
    for finding in (silence_finding(0.0, 16.0), silence_finding(0.0, 16.0, "madrid", ["nl-1"])):
        assert not wrong(finding.message), finding.message
        assert not any(wrong(value) for value in finding.evidence.values())
