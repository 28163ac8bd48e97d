"""What leaked, and what proves that it no longer leaks."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from vpn_sentinel.agent.containment.proof import Cause, Flow, cause_of, from_text, proven, to_text
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import (
    Answer,
    Canary,
    Escape,
    Link,
    Observation,
    Path,
    Probe,
    ResolverSighting,
    Trigger,
)
from vpn_sentinel.domain.policy import IPAddress, Policy
from vpn_sentinel.domain.verdict import State

POLICY = Policy(home_networks=(ip_network("91.10.10.20/32"),))
DNS = ip_address("9.9.9.9")


def canary(answer: Answer, path: Path, address: str | None = None, family: int = 4) -> Canary:
    return Canary(
        probe=Probe.DEFAULT,
        target="echo",
        family=family,
        answer=answer,
        path=path,
        address=ip_address(address) if address else None,
    )


def asked(answer: Answer, path: Path = Path.TUNNEL) -> ResolverSighting:
    return ResolverSighting(method="akamai", nameserver=DNS, answer=answer, path=path)


INSIDE = canary(Answer.ANSWERED, Path.TUNNEL, "185.65.134.10")
WELL = Observation(
    trigger=Trigger.TIMER,
    link=Link(name="wg0", present=True, up=True),
    canaries=(INSIDE,),
    resolvers=(asked(Answer.ANSWERED),),
)
WHOLE = Cause(families=frozenset({4}))
SIX = Cause(families=frozenset({6}))
NAMES = Cause(nameservers=frozenset({DNS}))
SPLIT = Cause(flows=frozenset({Flow(ip_address("198.51.100.9"), 443, "tcp")}))
AWAY6 = canary(Answer.BLOCKED, Path.OUTSIDE, family=6)

CASES = {
    "all through the tunnel": (WELL, WHOLE, Path.TUNNEL, True),
    "nothing comes back": (replace(WELL, canaries=(canary(Answer.LOST, Path.TUNNEL),)), WHOLE, Path.TUNNEL, False),
    "the tunnel is gone": (replace(WELL, link=Link(name="wg0", present=False, up=False)), WHOLE, Path.TUNNEL, False),
    "IPv6 is still routed outside and held": (replace(WELL, canaries=(INSIDE, AWAY6)), SIX, Path.TUNNEL, False),
    "IPv6 was never what leaked": (replace(WELL, canaries=(INSIDE, AWAY6)), WHOLE, Path.TUNNEL, True),
    "the nameserver that leaked is held": (
        replace(WELL, resolvers=(asked(Answer.BLOCKED),)),
        NAMES,
        Path.TUNNEL,
        False,
    ),
    "no nameserver was asked": (replace(WELL, resolvers=()), NAMES, Path.TUNNEL, False),
    "the nameserver answers through the tunnel": (WELL, NAMES, Path.TUNNEL, True),
    "the destination is still routed outside": (WELL, SPLIT, Path.OUTSIDE, False),
    "the destination is routed through the tunnel": (WELL, SPLIT, Path.TUNNEL, True),
}


@pytest.mark.parametrize(("seen", "cause", "path", "expected"), CASES.values(), ids=CASES.keys())
def test_proven(seen: Observation, cause: Cause, path: Path, expected: bool) -> None:
    def path_of(_address: IPAddress, _port: int, _protocol: str) -> Path:
        return path

    assert proven(seen, judge(seen, POLICY), cause, path_of) is expected


def test_a_leaking_round_names_its_cause() -> None:
    escape = Escape(
        interface="eth0",
        protocol="udp",
        source=ip_address("192.168.20.10"),
        destination=ip_address("198.51.100.9"),
        destination_port=4444,
    )
    outside = canary(Answer.ANSWERED, Path.OUTSIDE, "91.10.10.20")
    seen = replace(WELL, canaries=(outside,), escapes=(escape,), resolvers=(asked(Answer.ANSWERED, Path.OUTSIDE),))
    verdict = judge(seen, POLICY)
    assert verdict.state is State.LEAKING
    assert cause_of(seen, verdict, POLICY) == Cause(
        families=frozenset({4}),
        nameservers=frozenset({DNS}),
        flows=frozenset({Flow(escape.destination, 4444, "udp")}),
    )


def test_what_may_leave_is_no_cause() -> None:
    allowed = Escape(
        interface="eth0", protocol="tcp", source=ip_address("192.168.20.10"), destination=ip_address("198.51.100.9")
    )
    seen = replace(WELL, escapes=(allowed,))
    policy = replace(POLICY, allowed_outside=(ip_network("198.51.100.0/24"),))
    assert cause_of(seen, judge(seen, policy), policy) == Cause()


def test_a_cause_survives_being_kept() -> None:
    whole = Cause(families=frozenset({4, 6}), nameservers=frozenset({DNS}), flows=SPLIT.flows)
    assert from_text(to_text(whole)) == whole


@pytest.mark.parametrize("text", [None, "", "nonsense", "[]", '{"families": ["x"]}', '{"flows": [1]}'])
def test_what_cannot_be_read_is_no_cause(text: str | None) -> None:
    assert from_text(text) == Cause()
