"""When to run a round: at the start, on the timer, when a sensor gives a reason, and again after trouble.

One round at a time. After a change during a round its answers may be outdated: it is cut short and begun again, but
never twice in a row, so that constant change cannot prevent every result. A trigger with less weight than the round's
own, such as a pulse that was lost because routes changed, waits for its end.

A round that raises, or never ends, is reported like any other fact. If the agent crashed instead and were restarted
each time, it would look alive, and its last report would look true.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from vpn_sentinel.agent.rounds.pauses import Pauses
from vpn_sentinel.agent.rounds.state import RoundState
from vpn_sentinel.agent.rounds.triggers import TriggerQueue, outweighs
from vpn_sentinel.domain.judge import judge, with_learned_home
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State, Verdict
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

# The time to each round after a change of state: together longer than every grace, so that the change is confirmed
# soon after its grace.
RECHECKS_S: Final = (1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0)
TROUBLE_INTERVAL_S: Final = 15.0  # between rounds while trouble lasts
ROUND_TIMEOUT_S: Final = 25.0  # more than a round takes where nothing answers at all
# Changes come in groups: triggers may start so many rounds at once, then one per gap.
MAX_BURST: Final = 3
BURST_GAP_S: Final = 1.0
_MAX_REASON_CHARS: Final = 200
_ON_TIME: Final = frozenset({Trigger.TIMER, Trigger.RECHECK, Trigger.START})
_CHANGES: Final = frozenset({Trigger.NETWORK, Trigger.LEAK})


class Schedule:
    """When the next round is due if nothing triggers one; no clock of its own."""

    def __init__(self, interval: float, rng: random.Random | None = None) -> None:
        self._interval = interval
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._state: State | None = None
        self._step = len(RECHECKS_S)

    def after(self, state: State) -> tuple[float, Trigger]:
        """Seconds from the start of the round that found `state` to the next one, and the next one's trigger."""
        if state is not self._state and (self._state is not None or state is not State.PROTECTED):
            self._step = 0
        self._state = state
        if self._step < len(RECHECKS_S):
            self._step += 1
            return min(RECHECKS_S[self._step - 1], self._interval), Trigger.RECHECK
        if state is not State.PROTECTED:
            return min(TROUBLE_INTERVAL_S, self._interval), Trigger.RECHECK
        # Never longer: the server expects a report at least every interval.
        return self._interval * self._rng.uniform(0.9, 1.0), Trigger.TIMER


class TriggerRateLimit:
    """How soon a trigger may start a round; no clock of its own. Scheduled rounds do not count."""

    def __init__(self) -> None:
        self._full_at = float("-inf")  # when MAX_BURST rounds may start at once again

    def wait(self, now: float) -> float:
        """Seconds until a trigger may start the next round."""
        return max(0.0, self._full_at - (MAX_BURST - 1) * BURST_GAP_S - now)

    def started(self, now: float) -> None:
        self._full_at = max(self._full_at, now) + BURST_GAP_S


class Scheduler:
    """`run_round` runs one round; `done` gets each observation with its verdict. `state` keeps the result."""

    def __init__(
        self,
        run_round: Callable[[Trigger, Policy], Coroutine[Any, Any, Observation]],
        done: Callable[[Observation, Verdict], None],
        *,
        triggers: TriggerQueue,
        state: RoundState,
        interval: float,
        clock: Clock,
        rng: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        judge: Callable[[Observation, Policy], Verdict] = judge,
        limit: float = ROUND_TIMEOUT_S,
        paused: Callable[[], None] = lambda: None,
    ) -> None:
        """`paused` is called when this process did not run for a while: timeouts of that time mean nothing."""
        self._run_round = run_round
        self._done = done
        self._triggers = triggers
        self._state = state
        self._clock = clock
        self._judge = judge
        self._sleep = sleep
        self._limit = limit
        self._pauses = Pauses(clock.boottime, paused)
        self._logged_break = ""
        self._schedule = Schedule(interval, rng)
        self._trigger_limit = TriggerRateLimit()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pauses.run())
            group.create_task(self._rounds())

    async def _rounds(self) -> None:
        trigger, may_cut = Trigger.START, True
        while True:
            started = self._clock.boottime()
            seen = await self._round(trigger, may_cut=may_cut)
            if seen is None:
                trigger, may_cut = self._triggers.take() or Trigger.NETWORK, False
                continue
            may_cut = True
            self._finish(seen)
            trigger = await self._next(started)

    async def _round(self, trigger: Trigger, *, may_cut: bool) -> Observation | None:
        """Run one round; None when a change cut it short, or this process did not run for a while."""
        started_at = self._clock.boottime()
        async with asyncio.TaskGroup() as group:
            round_task = group.create_task(self._complete_round(trigger))
            trigger_task = group.create_task(self._triggers.wait(lambda arrived: _cuts(arrived, trigger)))
            await asyncio.wait(
                [round_task, trigger_task] if may_cut else [round_task], return_when=asyncio.FIRST_COMPLETED
            )
            if not round_task.done():
                round_task.cancel()
            trigger_task.cancel()
        # After a pause its timeouts mean nothing. Not twice in a row: on a machine that is always late, a round must
        # count.
        if round_task.cancelled() or (may_cut and self._pauses.ended_since(started_at)):
            return None
        return round_task.result()

    async def _complete_round(self, trigger: Trigger) -> Observation:
        """Run a round to its end; one that fails becomes an observation with the reason (`broken`)."""
        broken = None
        try:
            async with asyncio.timeout(self._limit) as limit:
                seen = await self._run_round(trigger, self._state.policy)
        except Exception as e:  # noqa: BLE001 - any failure is reported, and logged below
            broken = e
            reason = f"a round did not end within {self._limit:g} s" if limit.expired() else _reason(e)
            seen = Observation(trigger=trigger, broken=reason)
        if seen.broken != self._logged_break:
            self._logged_break = seen.broken
            if broken is not None:
                log.error("a round failed", extra={"reason": seen.broken}, exc_info=broken)
            else:
                log.info("rounds work again")
        return seen

    def _finish(self, seen: Observation) -> None:
        self._state.policy = with_learned_home(seen, self._state.policy)
        verdict = self._judge(seen, self._state.policy)
        self._log_verdict(verdict)
        self._state.verdict = verdict
        if not seen.broken:
            self._state.last_success = self._clock.boottime()
        self._done(seen, verdict)

    def _log_verdict(self, verdict: Verdict) -> None:
        codes = {f.code for f in verdict.findings}
        old = self._state.verdict
        if old is not None and old.state is verdict.state and codes == {f.code for f in old.findings}:
            return
        level = logging.INFO if verdict.state is State.PROTECTED else logging.WARNING
        reasons = "; ".join(f.message for f in verdict.findings)
        log.log(level, "verdict", extra={"state": verdict.state, "codes": ",".join(sorted(codes)), "why": reasons})

    async def _next(self, started: float) -> Trigger:
        """Wait for the schedule or a trigger, whichever comes first."""
        wait, trigger = self._schedule.after(self._state.state or State.UNKNOWN)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, started + wait - self._clock.boottime())):
                await self._triggers.wait()
        arrived = self._triggers.take()
        if arrived is None:
            return trigger
        await self._sleep(self._trigger_limit.wait(self._clock.boottime()))
        self._trigger_limit.started(self._clock.boottime())
        return self._triggers.take() or arrived


def _cuts(arrived: Trigger, begun_by: Trigger) -> bool:
    """Whether the trigger `arrived` outdates a round that `begun_by` started."""
    return arrived in _CHANGES or begun_by in _ON_TIME or not outweighs(begun_by, arrived)


def _reason(error: BaseException) -> str:
    """The first error of a group, in one line of at most 200 printable characters, as the wire requires."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return "".join(c if c.isprintable() else " " for c in text)[:_MAX_REASON_CHARS]
