"""Every sentence that people read, with all optional facts missing: no "None", no empty quotes, no double space."""

import re
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpn_sentinel.domain.judge import judge, judge_reference
from vpn_sentinel.domain.machine import silence_finding
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
from vpn_sentinel.domain.verdict import Code, Finding, State, Verdict
from vpn_sentinel.server.notify.channels.webhook import body, short_body
from vpn_sentinel.server.notify.text import html, plain

ADDRESS, ADDRESS6 = ip_address("146.70.1.2"), ip_address("2001:db8::7")
_WRONG = re.compile(r"\bNone\b|\"\"|''|``|  |\(\)| [.,;:]|^\s|\s$")


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


@settings(deadline=None, max_examples=1000)
@given(_seen)
def test_a_finding_reads_well_whatever_is_not_known(seen: Observation) -> None:
    for text in (*texts(judge(seen, Policy())), *texts(judge_reference(seen))):
        assert not wrong(text), text


@given(seen=_seen)
@settings(max_examples=400, deadline=None)
def test_what_is_not_known_is_left_out_of_the_facts(seen: Observation) -> None:
    for finding in judge(seen, Policy()).findings:
        assert not [v for v in finding.evidence.values() if "unknown" in v or v == "not told"], finding


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
