import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import pytest

from tests.conftest import ManualClock, until
from vpn_sentinel.agent.rounds.scheduler import (
    BURST_GAP_S,
    MAX_BURST,
    RECHECKS_S,
    TROUBLE_INTERVAL_S,
    Schedule,
    Scheduler,
    TriggerRateLimit,
)
from vpn_sentinel.agent.rounds.state import RoundState
from vpn_sentinel.agent.rounds.triggers import TriggerQueue
from vpn_sentinel.domain.judge import judge, judge_reference
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Probe, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import Code, State, Verdict
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.wire.codec import check_observation

LINK = Link(name="wg0", present=True, up=True)


def canary(address: str | None, path: Path = Path.TUNNEL, probe: Probe = Probe.DEFAULT) -> Canary:
    answer = Answer.ANSWERED if address else Answer.LOST
    seen = ip_address(address) if address else None
    return Canary(probe=probe, target="echo", family=4, answer=answer, path=path, address=seen)


def well(trigger: Trigger) -> Observation:
    return Observation(trigger=trigger, link=LINK, interfaces=("wg0",), canaries=(canary("203.0.113.4"),))


def dead(trigger: Trigger) -> Observation:
    return Observation(trigger=trigger, link=LINK, interfaces=("wg0",), canaries=(canary(None),))


def test_the_most_telling_trigger_wins() -> None:
    queue = TriggerQueue()
    assert queue.take() is None
    for trigger in (Trigger.CANARY, Trigger.NETWORK, Trigger.TIMER):
        queue.put(trigger)
    assert queue.take() is Trigger.NETWORK
    assert queue.take() is None


def test_all_well_waits_for_the_interval_and_never_longer() -> None:
    schedule = Schedule(30.0, random.Random(1))
    waits = [schedule.after(State.PROTECTED) for _ in range(50)]
    assert {trigger for _, trigger in waits} == {Trigger.TIMER}
    assert all(27.0 <= wait <= 30.0 for wait, _ in waits)
    assert len({wait for wait, _ in waits}) > 40


def test_trouble_is_looked_at_again_soon_then_now_and_then() -> None:
    schedule = Schedule(30.0)
    schedule.after(State.PROTECTED)
    waits = [schedule.after(State.DOWN)[0] for _ in range(len(RECHECKS_S) + 2)]
    assert waits == [*RECHECKS_S, TROUBLE_INTERVAL_S, TROUBLE_INTERVAL_S]


def test_recovery_is_confirmed_too() -> None:
    schedule = Schedule(30.0)
    for _ in range(20):
        schedule.after(State.DOWN)
    assert [schedule.after(State.PROTECTED)[0] for _ in RECHECKS_S] == list(RECHECKS_S)
    assert schedule.after(State.PROTECTED)[1] is Trigger.TIMER


def test_a_kind_of_trouble_that_changes_begins_again() -> None:
    schedule = Schedule(30.0)
    schedule.after(State.DOWN)
    schedule.after(State.DOWN)
    assert schedule.after(State.LEAKING) == (RECHECKS_S[0], Trigger.RECHECK)


def test_a_short_interval_is_never_exceeded() -> None:
    schedule = Schedule(2.0)
    assert [schedule.after(State.DOWN)[0] for _ in range(7)] == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_rechecks_outlast_every_grace() -> None:
    policy = Policy()
    assert sum(RECHECKS_S) > max(policy.grace_down, policy.grace_degraded, policy.grace_recovery)


Look = Callable[[Trigger, Policy], Coroutine[Any, Any, Observation]]


class Running:
    """A scheduler in a task, with everything it saw."""

    def __init__(self, look: Look, interval: float = 60.0, policy: Policy | None = None) -> None:
        self.seen: list[tuple[Trigger, State]] = []
        self.slept: list[float] = []
        self.triggers, self.state = TriggerQueue(), RoundState(policy or Policy())
        self.scheduler = Scheduler(
            look,
            self._done,
            triggers=self.triggers,
            state=self.state,
            interval=interval,
            clock=SystemClock(),
            sleep=self._sleep,
        )

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)

    def _done(self, seen: Observation, verdict: Verdict) -> None:
        self.seen.append((seen.trigger, verdict.state))

    async def __aenter__(self) -> "Running":
        self._task = asyncio.get_running_loop().create_task(self.scheduler.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


async def turns() -> None:
    """Let everything go on that waits for nothing."""
    for _ in range(20):
        await asyncio.sleep(0)


async def look_well(trigger: Trigger, _: Policy) -> Observation:
    return well(trigger)


async def test_it_looks_at_the_start_and_when_a_trigger_comes() -> None:
    async with Running(look_well) as running:
        await until(lambda: running.seen)
        running.triggers.put(Trigger.NETWORK)
        await until(lambda: len(running.seen) == 2)
    assert running.seen == [(Trigger.START, State.PROTECTED), (Trigger.NETWORK, State.PROTECTED)]
    assert running.state.last_success is not None


async def test_many_rings_are_one_round() -> None:
    async with Running(look_well) as running:
        await until(lambda: running.seen)
        for _ in range(20):
            running.triggers.put(Trigger.NETWORK)
        await until(lambda: len(running.seen) == 2)
        await turns()
        running.triggers.put(Trigger.CANARY)
        await until(lambda: len(running.seen) == 3)
    assert [trigger for trigger, _ in running.seen] == [Trigger.START, Trigger.NETWORK, Trigger.CANARY]
    assert len(running.slept) == 2
    assert all(0.0 <= seconds <= BURST_GAP_S for seconds in running.slept)


async def test_a_change_right_after_another_ones_round_is_not_held_up() -> None:
    """A client that ends changes one thing after the other: what leaks may come with the last of them."""
    async with Running(look_well) as running:
        await until(lambda: running.seen)
        for rounds in range(2, 2 + MAX_BURST + 1):
            running.triggers.put(Trigger.NETWORK)
            await until(lambda rounds=rounds: len(running.seen) == rounds)
    *at_once, held = running.slept
    assert at_once == [0.0] * MAX_BURST
    assert held > 0.0


def test_constant_change_starts_a_round_a_second() -> None:
    pace, now, starts = TriggerRateLimit(), 100.0, list[float]()
    while now < 130.0:
        now += max(0.01, pace.wait(now))
        pace.started(now)
        starts.append(now)
    assert starts[MAX_BURST - 1] - starts[0] < BURST_GAP_S
    gaps = [later - earlier for earlier, later in zip(starts[MAX_BURST:], starts[MAX_BURST + 1 :], strict=False)]
    assert gaps == pytest.approx([BURST_GAP_S] * len(gaps))
    assert pace.wait(now + MAX_BURST * BURST_GAP_S) == 0.0


async def test_the_timer_makes_rounds_without_any_event() -> None:
    async with Running(look_well, interval=0.05) as running:
        await until(lambda: len(running.seen) >= 3)
    assert {trigger for trigger, _ in running.seen[1:]} == {Trigger.TIMER}


async def test_a_change_during_a_round_begins_it_again_but_not_twice_in_a_row() -> None:
    begun: list[Trigger] = []
    go = asyncio.Event()

    async def slow(trigger: Trigger, _: Policy) -> Observation:
        begun.append(trigger)
        await go.wait()
        return well(trigger)

    async with Running(slow) as running:
        await until(lambda: begun)
        running.triggers.put(Trigger.NETWORK)
        await until(lambda: len(begun) == 2)
        running.triggers.put(Trigger.NETWORK)
        await turns()
        assert len(begun) == 2
        go.set()
        await until(lambda: len(running.seen) == 2)
    assert [trigger for trigger, _ in running.seen] == [Trigger.NETWORK, Trigger.NETWORK]


CUTS = {
    "routes changed while routes were looked at": (Trigger.NETWORK, Trigger.NETWORK, True),
    "a pulse was lost because they changed": (Trigger.NETWORK, Trigger.CANARY, False),
    "a counter moved because they changed": (Trigger.NETWORK, Trigger.DEVICE, False),
    "pulses are back while a lost one is looked into": (Trigger.CANARY, Trigger.CANARY, True),
    "a packet left while routes were looked at": (Trigger.NETWORK, Trigger.LEAK, True),
    "routes changed while a packet is looked into": (Trigger.LEAK, Trigger.NETWORK, True),
    "a pulse was lost during a regular round": (Trigger.TIMER, Trigger.CANARY, True),
}


@pytest.mark.parametrize(("begun_by", "rung", "cut"), CUTS.values(), ids=CUTS.keys())
async def test_a_round_is_cut_short_by_what_makes_it_worthless(begun_by: Trigger, rung: Trigger, *, cut: bool) -> None:
    begun: list[Trigger] = []
    go = asyncio.Event()

    async def slow(trigger: Trigger, _: Policy) -> Observation:
        begun.append(trigger)
        if len(begun) > 1:
            await go.wait()
        return well(trigger)

    interval = 0.02 if begun_by is Trigger.TIMER else 60.0
    async with Running(slow, interval=interval) as running:
        await until(lambda: running.seen)
        if begun_by is not Trigger.TIMER:
            running.triggers.put(begun_by)
        await until(lambda: len(begun) == 2)
        running.triggers.put(rung)
        await turns()
        assert begun[1:] == ([begun_by, rung] if cut else [begun_by])
        go.set()
        await until(lambda: len(running.seen) >= 3 - cut)
    assert [trigger for trigger, _ in running.seen][1 : 3 - cut] == ([rung] if cut else [begun_by, rung])


async def test_home_is_learned_from_a_canary_beside_the_tunnel() -> None:
    policies: list[Policy] = []

    async def beside(trigger: Trigger, policy: Policy) -> Observation:
        policies.append(policy)
        open_ = canary("198.51.100.7", Path.OUTSIDE, Probe.PHYSICAL)
        return Observation(trigger=trigger, link=LINK, canaries=(canary("203.0.113.4"), open_))

    async with Running(beside, interval=0.02) as running:
        await until(lambda: len(running.seen) >= 2)
    assert not policies[0].is_home(ip_address("198.51.100.7"))
    assert policies[1].is_home(ip_address("198.51.100.7"))


async def test_a_verdict_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answers = iter([well, dead, dead, dead, well])

    async def look(trigger: Trigger, _: Policy) -> Observation:
        return next(answers, well)(trigger)

    async with Running(look, interval=0.01) as running:
        await until(lambda: len(running.seen) >= 6)
    said = [r.__dict__["state"] for r in caplog.records if r.getMessage() == "verdict"]
    assert said == [State.PROTECTED, State.DOWN, State.PROTECTED]


async def test_a_round_that_raises_is_told_and_the_next_one_is_made(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answers = iter([well, None, None, well])

    async def look(trigger: Trigger, _: Policy) -> Observation:
        made = next(answers, well)
        if made is None:
            raise ExceptionGroup("several", [OSError(24, "Too many open files")])
        return made(trigger)

    async with Running(look, interval=0.01) as running:
        await until(lambda: len(running.seen) >= 4)
    assert [state for _, state in running.seen[:4]] == [
        State.PROTECTED, State.UNKNOWN, State.UNKNOWN, State.PROTECTED,
    ]  # fmt: skip
    (broke,) = [r for r in caplog.records if r.getMessage() == "a round failed"]
    assert broke.__dict__["reason"] == "OSError: [Errno 24] Too many open files"
    assert broke.exc_info
    assert [r.getMessage() for r in caplog.records].count("rounds work again") == 1


async def test_rounds_that_always_raise_are_no_success_for_the_health_check() -> None:
    async def broken(_t: Trigger, _p: Policy) -> Observation:
        raise ZeroDivisionError

    async with Running(broken, interval=0.01) as running:
        await until(lambda: len(running.seen) >= 3)
    assert running.state.last_success is None
    assert {state for _, state in running.seen} == {State.UNKNOWN}


async def test_what_broke_a_round_is_told_in_words_that_the_server_takes() -> None:
    told: list[Observation] = []

    async def broken(_t: Trigger, _p: Policy) -> Observation:
        raise ValueError("a line\nand another\x00 " + 300 * "x")

    scheduler = Scheduler(
        broken,
        lambda seen, _: told.append(seen),
        triggers=TriggerQueue(),
        state=RoundState(Policy()),
        interval=1.0,
        clock=SystemClock(),
    )
    task = asyncio.get_running_loop().create_task(scheduler.run())
    await until(lambda: told)
    task.cancel()
    check_observation(told[0])
    (finding,) = judge(told[0], Policy()).findings
    assert finding.code is Code.NOTHING_SEEN
    assert finding.message.startswith("The agent cannot look at its tunnel: ValueError: a line and another")
    assert judge_reference(told[0]).findings == (finding,)


async def test_a_round_that_never_ends_is_told() -> None:
    told: list[Observation] = []

    async def hangs(_t: Trigger, _p: Policy) -> Observation:
        await asyncio.Event().wait()
        raise AssertionError

    clock = SystemClock()
    scheduler = Scheduler(
        hangs,
        lambda s, _: told.append(s),
        triggers=TriggerQueue(),
        state=RoundState(Policy()),
        interval=0.01,
        clock=clock,
        limit=0.02,
    )
    task = asyncio.get_running_loop().create_task(scheduler.run())
    await until(lambda: len(told) >= 2)
    task.cancel()
    assert {t.broken for t in told} == {"a round did not end within 0.02 s"}
    assert judge(told[0], Policy()).state is State.UNKNOWN


async def test_a_change_cuts_a_round_that_hangs() -> None:
    begun: list[Trigger] = []

    async def look(trigger: Trigger, _: Policy) -> Observation:
        begun.append(trigger)
        if len(begun) == 1:
            await asyncio.Event().wait()
        return well(trigger)

    async with Running(look) as running:
        await until(lambda: begun)
        running.triggers.put(Trigger.NETWORK)
        await until(lambda: running.seen)
    assert running.seen == [(Trigger.NETWORK, State.PROTECTED)]


async def test_a_round_in_which_the_process_did_not_run_is_made_again() -> None:
    clock, told, paused = ManualClock(), list[State](), list[int]()
    begun = 0

    async def look(trigger: Trigger, _: Policy) -> Observation:
        nonlocal begun
        begun += 1
        if begun == 1:
            clock.now += 30.0  # SIGSTOP and SIGCONT: every answer came too late
            return dead(trigger)
        return well(trigger)

    scheduler = Scheduler(
        look,
        lambda _, verdict: told.append(verdict.state),
        triggers=TriggerQueue(),
        state=RoundState(Policy()),
        interval=60.0,
        clock=clock,
        paused=lambda: paused.append(1),
    )
    task = asyncio.get_running_loop().create_task(scheduler.run())
    await until(lambda: told)
    task.cancel()
    assert (begun, told, paused) == (2, [State.PROTECTED], [1])


async def test_a_machine_that_is_always_late_is_heard_all_the_same() -> None:
    clock, told = ManualClock(), list[State]()

    async def look(trigger: Trigger, _: Policy) -> Observation:
        clock.now += 30.0
        return dead(trigger)

    scheduler = Scheduler(
        look,
        lambda _, v: told.append(v.state),
        triggers=TriggerQueue(),
        state=RoundState(Policy()),
        interval=60.0,
        clock=clock,
    )
    task = asyncio.get_running_loop().create_task(scheduler.run())
    await until(lambda: told)
    task.cancel()
    assert told[0] is State.DOWN
