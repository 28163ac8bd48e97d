"""The limits and times of the policy come from settings, and the verdict follows them."""

from dataclasses import fields

import pytest

from tests.domain.test_machine import standing, turns, verdict
from vpn_sentinel.agent.settings import ProbeSettings
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.machine import Memory, advance
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Probe, Quality, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import Code, State
from vpn_sentinel.runtime.settings import SettingError, Source
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.wire.settings import POLICY, TIMES

THROUGH = Canary(probe=Probe.DEFAULT, target="echo", family=4, answer=Answer.ANSWERED, path=Path.TUNNEL)
UP = Link(name="wg0", present=True, up=True)


def source(env: dict[str, str]) -> Source:
    return Source(env={f"VPN_SENTINEL_{name}": value for name, value in env.items()})


def on_the_server(**env: str) -> Policy:
    return ServerSettings.read(source(env)).policy


def on_the_agent(**env: str) -> Policy:
    return ProbeSettings.read(source(env)).policy


def measured(*, lost: int = 0, rtt_ms: float = 20.0) -> Observation:
    """A round through a tunnel of which 100 pulses tell this."""
    quality = Quality(seconds=60.0, sent=100, lost=lost, rtt_ms=rtt_ms)
    return Observation(trigger=Trigger.TIMER, link=UP, canaries=(THROUGH,), quality=quality)


LIMITS = {
    "the default takes a fifth": ({}, measured(lost=20), None),
    "and no more": ({}, measured(lost=21), Code.HIGH_LOSS),
    "less is taken": ({"MAX_LOSS": "0.05"}, measured(lost=6), Code.HIGH_LOSS),
    "in percent": ({"MAX_LOSS": "5 %"}, measured(lost=6), Code.HIGH_LOSS),
    "as much as is taken": ({"MAX_LOSS": "5%"}, measured(lost=5), None),
    "more is taken": ({"MAX_LOSS": "0.4"}, measured(lost=40), None),
    "any loss is taken": ({"MAX_LOSS": "1"}, measured(lost=99), None),
    "the default takes a second": ({}, measured(rtt_ms=1000), None),
    "and no longer": ({}, measured(rtt_ms=1001), Code.HIGH_LATENCY),
    "a shorter way": ({"MAX_RTT_MS": "150"}, measured(rtt_ms=151), Code.HIGH_LATENCY),
    "a longer way": ({"MAX_RTT_MS": "2500"}, measured(rtt_ms=2400), None),
}


@pytest.mark.parametrize("policy", [on_the_server, on_the_agent])
@pytest.mark.parametrize(("env", "seen", "code"), LIMITS.values(), ids=LIMITS.keys())
def test_the_verdict_follows_the_limit(
    policy: type[Policy], env: dict[str, str], seen: Observation, code: Code
) -> None:
    found = judge(seen, policy(**env))  # type: ignore[arg-type]
    assert [f.code for f in found.findings if f.code in (Code.HIGH_LOSS, Code.HIGH_LATENCY)] == ([code] if code else [])
    assert (found.state is State.DEGRADED) is (code is not None)


def outages(policy: Policy, times: int, every: float) -> Memory:
    """A tunnel that was down so many times, `every` so many seconds, and is down now."""
    memory = standing(State.PROTECTED)
    for at in (200.0 + every * n for n in range(times)):
        for later, state in ((0, State.PROTECTED), (1, State.DOWN), (6, State.DOWN)):
            memory, _ = advance(memory, verdict(state), at + later, policy)
        if at < 200.0 + every * (times - 1):
            for later in (7, 12):
                memory, _ = advance(memory, verdict(State.PROTECTED), at + later, policy)
    assert memory.state is State.DOWN
    return memory


FLAPPING = {
    "three times in five minutes": ({}, 3, 60.0, True),
    "twice": ({}, 2, 60.0, False),
    "three times in ten": ({}, 3, 300.0, False),
    "twice is enough": ({"FLAP_COUNT": "2"}, 2, 60.0, True),
    "three times is not": ({"FLAP_COUNT": "4"}, 3, 60.0, False),
    "a longer window": ({"FLAP_WINDOW": "900"}, 3, 300.0, True),
    "a shorter one": ({"FLAP_WINDOW": "90"}, 3, 60.0, False),
}


@pytest.mark.parametrize(("env", "times", "every", "flaps"), FLAPPING.values(), ids=FLAPPING.keys())
def test_what_flaps_follows_the_settings(env: dict[str, str], times: int, every: float, flaps: bool) -> None:
    memory = outages(on_the_server(**env), times, every)
    assert (Code.FLAPPING in {f.code for f in memory.findings}) is flaps


def test_the_calm_that_ends_flapping_follows_its_setting() -> None:
    policy = on_the_server(FLAP_CALM="20")
    memory = outages(policy, 3, 60.0)
    memory, _ = advance(memory, verdict(State.PROTECTED), 400.0, policy)
    memory, early = advance(memory, verdict(State.PROTECTED), 419.0, policy)
    memory, events = advance(memory, verdict(State.PROTECTED), 420.0, policy)
    assert (turns(early), turns(events)) == ([], [(400.0, State.PROTECTED)])


GRACES = {
    "GRACE_DOWN": (State.PROTECTED, State.DOWN),
    "GRACE_DEGRADED": (State.PROTECTED, State.DEGRADED),
    "GRACE_RECOVERY": (State.DOWN, State.PROTECTED),
    "GRACE_UNVERIFIED": (State.PROTECTED, State.UNVERIFIED),
}


@pytest.mark.parametrize(("name", "way"), GRACES.items())
def test_a_state_is_reached_after_its_grace(name: str, way: tuple[State, State]) -> None:
    policy = on_the_server(**{name: "33"})
    memory, _ = advance(standing(way[0]), verdict(way[1]), 200.0, policy)
    memory, early = advance(memory, verdict(way[1]), 232.9, policy)
    memory, events = advance(memory, verdict(way[1]), 233.0, policy)
    assert (turns(early), turns(events)) == ([], [(200.0, way[1])])


def test_every_part_of_the_policy_is_a_setting() -> None:
    declared = {setting.name.lower(): setting.default for setting in (*POLICY.settings, *TIMES.settings)}
    assert declared == {part.name: part.default for part in fields(Policy)}
    assert on_the_server() == on_the_agent() == Policy()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_LOSS", "20"), ("MAX_LOSS", "-0.1"), ("MAX_LOSS", "101%"), ("MAX_LOSS", "few"), ("MAX_LOSS", "nan"),
        ("MAX_RTT_MS", "0"), ("MAX_RTT_MS", "1s"), ("FLAP_COUNT", "1"), ("FLAP_COUNT", "17"), ("FLAP_WINDOW", "0"),
    ],
)  # fmt: skip
def test_a_limit_that_cannot_be_used_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=f"^VPN_SENTINEL_{name}: '{value}' is not a "):
        on_the_server(**{name: value})
