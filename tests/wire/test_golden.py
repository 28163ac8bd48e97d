"""The protocol as it is written down in `golden/`: a change here is a change for every agent in the field.

A file that no longer fits is never regenerated to make a test pass; a new field gets a default and a new file.
"""

import json
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from vpn_sentinel.domain import observation as o
from vpn_sentinel.domain.machine import Before, Candidate, Memory, Outage
from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import Code, Finding, State
from vpn_sentinel.wire.codec import decoder, encode
from vpn_sentinel.wire.keepalive import Received
from vpn_sentinel.wire.messages import (
    Ack,
    Echo,
    Exchange,
    FromAgent,
    FromServer,
    Hello,
    Refused,
    Report,
    Reports,
    Welcome,
    fingerprint,
)
from vpn_sentinel.wire.problem import Problem, problem

GOLDEN = Path(__file__).parent / "golden"

EXIT, HOME, EXIT6 = ip_address("146.70.1.2"), ip_address("91.10.20.30"), ip_address("2a0d:5600::2")
POLICY = Policy(
    home_networks=(ip_network("91.10.20.0/24"), ip_network("2003:e0::/32")),
    expected_countries=("NL", "SE"),
    allowed_resolvers=(ip_network("192.168.1.2"),),
    grace_down=3.0,
    grace_degraded=10.0,
    grace_recovery=5.5,
)
FULL = o.Observation(
    trigger=o.Trigger.NETWORK,
    link=o.Link(name="wg0", present=True, up=True, rx_bytes=18446744073709551615, tx_bytes=12),
    interfaces=("eth0", "wg0"),
    canaries=(
        o.Canary(
            probe=o.Probe.DEFAULT, target="echo", family=4, answer=o.Answer.ANSWERED, path=o.Path.TUNNEL,
            address=EXIT, rtt_ms=21.5,
        ),
        o.Canary(probe=o.Probe.DEFAULT, target="echo", family=6, answer=o.Answer.LOST, path=o.Path.TUNNEL),
        o.Canary(probe=o.Probe.PHYSICAL, target="echo", family=4, answer=o.Answer.BLOCKED, path=o.Path.OUTSIDE),
        o.Canary(probe=o.Probe.FIRST_HOP, target="cloudflare", family=4, answer=o.Answer.EXPIRED),
    ),
    resolvers=(
        o.ResolverSighting(
            method="akamai", nameserver=ip_address("127.0.0.11"), answer=o.Answer.ANSWERED, path=o.Path.LOCAL,
            egress=ip_address("172.70.1.1"), client=EXIT, subnet=ip_network("146.70.1.0/24"),
        ),
    ),
    places=(
        o.Place(
            ip=EXIT, source="mmdb", country="NL", region="North Holland", city="Amsterdam",
            timezone="Europe/Amsterdam", asn=9009, org="M247",
        ),
    ),
    dns_intercepted=False,
    took_ms=312.25,
)  # fmt: skip
BARE = o.Observation(trigger=o.Trigger.TIMER)
HELLO = Hello(
    protocol=1, client_id="nl-1", spool="0c9ae2", version="2.0.0", interval=30.0, wall=1800000000.25, policy=POLICY
)
REPORTS = Reports(
    items=[Report(seq=7, age=61.5, observation=FULL), Report(seq=9, age=0.0, observation=BARE)], pending=3, thinned=1
)
WELCOME = Welcome(ack=9, wall=1800000001.5, seen_from="146.70.1.2", echo=Echo(port=5000, id="00" * 8, key="ab" * 32))
LEAK = Finding(Code.IP_LEAK, "IPv4 traffic leaves.", {"address": "91.10.20.30"})
MEMORY = Memory(
    state=State.SILENT, since=1800000000.0, findings=(LEAK,),
    candidate=Candidate(state=State.PROTECTED, since=1800000001.0),
    before=Before(
        state=State.DOWN, since=1799999990.0, findings=(),
        candidate=Candidate(state=State.DEGRADED, since=1799999995.0),
    ),
    seen_at=1800000002.0, exit4=EXIT, exit6=EXIT6, home=(ip_network("91.10.20.30/32"),), told=State.SILENT,
    told_exit=EXIT, trouble_since=1799999990.0, outage=Outage(began=1799999990.0, worst=State.DOWN),
)  # fmt: skip
NOTICE = Notice(
    kind=Kind.RECOVERED, tunnel="nl-1", at=1800000010.0, began=1800000000.0, was=State.LEAKING, exit=EXIT,
    old_exit=HOME, findings=(LEAK,), place="Amsterdam, NL", provider="M247 AS9009", timezone="Europe/Amsterdam",
    resolvers=("172.70.1.1 US",), details=("one more line",),
)  # fmt: skip


def _reports_of_routes(only: str, ports: tuple[int, int] | None) -> Reports:
    by_rule = o.Routed(
        interface="eth0", family=4, share=1.0, networks=(ip_network("0.0.0.0/0"),), only=only, ports=ports,
        asked=ip_address("8.8.8.8"), answer=o.Answer.EXPIRED,
    )  # fmt: skip
    seen = replace(BARE, routed=(o.Routed(interface="wg0", family=4, share=1.0), by_rule))
    return Reports(items=[Report(seq=1, age=0.5, observation=seen)])


MESSAGES: dict[str, tuple[Any, Any]] = {
    "hello": (HELLO, FromAgent),
    "reports": (REPORTS, FromAgent),
    "reports_of_routes": (_reports_of_routes("UDP to port 53 with TOS 0x10", (53, 53)), FromAgent),
    "exchange": (Exchange(hello=HELLO, reports=REPORTS), FromAgent),
    "welcome": (WELCOME, FromServer),
    "ack": (Ack(seq=9), FromServer),
    "refused": (Refused(reason="this token may only report as nl-2", retry=True), FromServer),
    "received": (Received(server_time="2027-01-15T08:00:00+00:00"), Received),
    "problem": (problem(422, "interval takes 0.1 to 86400 seconds"), Problem),
    # Not on any wire, but in every database.
    "memory": (MEMORY, Memory),
    "notice": (NOTICE, Notice),
    "finding": (LEAK, Finding),
}

FIRST = ("hello", "reports", "exchange", "welcome", "memory", "notice")


@pytest.mark.parametrize("name", MESSAGES)
def test_it_is_written_as_ever(name: str) -> None:
    assert json.loads(encode(MESSAGES[name][0])) == json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", MESSAGES)
def test_it_is_read_as_ever(name: str) -> None:
    value, kind = MESSAGES[name]
    assert decoder(kind)((GOLDEN / f"{name}.json").read_bytes()) == value


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "hello_of_few_words": Hello(
            protocol=1, client_id="nl-1", spool="0c9ae2", version="2.0.0", interval=30.0, wall=1800000000.25
        ),
        "reports_of_few_words": Reports(items=[Report(seq=1, age=0.5, observation=BARE)]),
        "reports_before_ports": _reports_of_routes("UDP to port 53", None),
    }.items(),
)
def test_what_is_left_out_has_a_default(name: str, value: Any) -> None:
    assert decoder(FromAgent)((GOLDEN / f"{name}.json").read_bytes()) == value


def test_the_fingerprint_of_a_message_is_as_ever() -> None:
    assert fingerprint(b"{}") == "792b36b6ff7940ed4f0ffc95d8ab832f"


@pytest.mark.parametrize("name", FIRST)
def test_what_the_first_release_wrote_is_read_as_ever(name: str) -> None:
    value, kind = MESSAGES[name]
    assert decoder(kind)((GOLDEN / f"{name}_of_the_first_release.json").read_bytes()) == value


EARLIER = {
    "reports_before_routes": "reports",
    "exchange_before_routes": "exchange",
    "reports_before_declared": "reports",
    "exchange_before_declared": "exchange",
    "reports_before_one_user": "reports",
    "exchange_before_one_user": "exchange",
    "reports_before_watch_refused": "reports",
    "exchange_before_watch_refused": "exchange",
    "welcome_before_memory": "welcome",
    "memory_before_told": "memory",
    "memory_before_moved": "memory",
    "refused_before_fingerprints": "refused",
    "notice_before_first": "notice",
}


@pytest.mark.parametrize("name", EARLIER)
def test_what_was_written_before_a_field_came_is_read_as_ever(name: str) -> None:
    value, kind = MESSAGES[EARLIER[name]]
    assert decoder(kind)((GOLDEN / f"{name}.json").read_bytes()) == value


def test_a_word_from_the_future_is_passed_over() -> None:
    assert decoder(FromAgent)((GOLDEN / "hello_from_the_future.json").read_bytes()) == HELLO


def test_every_file_is_used() -> None:
    first = {f"{name}_of_the_first_release" for name in FIRST}
    few = {"hello_of_few_words", "reports_of_few_words", "reports_before_ports", "hello_from_the_future", "echo"}
    assert {p.stem for p in GOLDEN.glob("*.json")} == {
        *MESSAGES,
        *few,
        *first,
        *(p.stem for p in GOLDEN.glob("keepalive_*")),
        *EARLIER,
    }
