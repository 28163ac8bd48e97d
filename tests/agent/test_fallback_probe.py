from ipaddress import ip_address

import pytest

from tests.agent.doubles import Loopback
from vpn_sentinel.agent.probes.targets import CLOUDFLARE
from vpn_sentinel.agent.sensors.fallback_probe import FallbackProbes, choose
from vpn_sentinel.domain.observation import Answer, Canary, Observation, Probe, Trigger


def canary(address: str | None, answer: Answer = Answer.ANSWERED, target: str = "echo") -> Canary:
    seen = ip_address(address) if address else None
    return Canary(probe=Probe.DEFAULT, target=target, family=4, answer=answer, address=seen)


LOST = canary(None, Answer.LOST)
HOME, EXIT = canary("198.51.100.7"), canary("203.0.113.4")

BEATS = {
    "all is well": ([EXIT, EXIT, EXIT], [False, False, False]),
    "one is lost": ([EXIT, LOST, EXIT], [False, False, False]),
    "two are lost": ([EXIT, LOST, LOST, LOST], [False, False, True, False]),
    "it comes back": ([LOST, LOST, EXIT, EXIT], [False, True, True, False]),
    "it comes from elsewhere": ([EXIT, HOME, HOME], [False, True, False]),
    "blocked counts as lost": ([canary(None, Answer.BLOCKED)] * 2, [False, True]),
    "answers without an address": ([canary(None), canary(None)], [False, False]),
    "another target is no change": ([EXIT, canary("198.51.100.7", target="cloudflare"), EXIT], [False, False, False]),
}


@pytest.mark.parametrize(("beats", "rings"), BEATS.values(), ids=BEATS.keys())
def test_answers(beats: list[Canary], rings: list[bool]) -> None:
    timing = FallbackProbes()
    assert [timing.note(b) for b in beats] == rings


def test_after_one_lost_the_next_does_not_wait() -> None:
    timing = FallbackProbes()
    timing.note(LOST)
    assert timing.in_doubt
    timing.note(LOST)
    assert not timing.in_doubt


def test_what_a_round_saw_is_no_news() -> None:
    timing = FallbackProbes()
    timing.note(EXIT)
    timing.start_from([HOME, LOST])
    assert not timing.note(HOME)


ECHO = Loopback("echo", 1)
OTHER = canary("203.0.113.4", target="cloudflare")
WHOM = {
    "nothing seen yet": (None, "echo"),
    "the echo was not asked yet": ((OTHER,), "echo"),
    "the echo answers": ((EXIT,), "echo"),
    "the server is down": ((LOST, OTHER), "cloudflare"),
    "nothing answers": ((LOST,), "echo"),
}


@pytest.mark.parametrize(("seen", "name"), WHOM.values(), ids=WHOM.keys())
def test_whom_to_ask(seen: tuple[Canary, ...] | None, name: str) -> None:
    observation = None if seen is None else Observation(trigger=Trigger.TIMER, canaries=seen)
    assert choose([ECHO], observation).name == name
    assert choose([], None) is CLOUDFLARE[0]


def test_a_way_that_leaves_beside_the_tunnel_on_purpose_is_not_asked() -> None:
    seen = Observation(trigger=Trigger.TIMER, canaries=(EXIT, OTHER))
    assert choose([ECHO], seen, fits=lambda _: False) is CLOUDFLARE[0]
