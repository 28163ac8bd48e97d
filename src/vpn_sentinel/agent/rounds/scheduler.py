"""When to look: at the start, on the timer, when a sensor gives a reason, and again after trouble.

One round at a time. A change during a round means that its answers may be of before: it is cut short and begun again,
but never twice in a row, so that constant change cannot keep the agent from ever seeing anything. What tells less than
the round's own reason, such as a pulse that was lost because routes changed, waits for its end instead.

A round that raises, or never ends, is a fact to be reported like any other: whoever starts a crashed agent again and
again would see an agent that lives, and what it said last would look true.
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
from vpn_sentinel.domain.judge import judge, learned_home
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State, Verdict
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

# Seconds until the rounds after a change of state: together longer than every grace, so that the change is settled,
# and soon after it.
RECHECKS_S: Final = (1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0)
UNWELL_EVERY_S: Final = 15.0  # seconds between rounds while trouble lasts
ROUND_TIMEOUT_S: Final = 25.0  # seconds for a round: more than one takes where nothing answers at all
# Changes come in groups: so many rounds triggers may start at once, then one in as many seconds.
MAX_BURST: Final = 3
BURST_GAP_S: Final = 1.0
_MAX_REASON_CHARS: Final = 200  # characters
_ON_TIME: Final = frozenset({Trigger.TIMER, Trigger.RECHECK, Trigger.START})
_CHANGES: Final = frozenset({Trigger.NETWORK, Trigger.LEAK})


class Schedule:
    """When the next round is due if nothing happens; no clock of its own."""

    def __init__(self, interval: float, rng: random.Random | None = None) -> None:
        self._interval = interval
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._state: State | None = None
        self._step = len(RECHECKS_S)

    def after(self, state: State) -> tuple[float, Trigger]:
        """Seconds from the start of the round that saw `state` until the next, and what to call it."""
        if state is not self._state and (self._state is not None or state is not State.PROTECTED):
            self._step = 0
        self._state = state
        if self._step < len(RECHECKS_S):
            self._step += 1
            return min(RECHECKS_S[self._step - 1], self._interval), Trigger.RECHECK
        if state is not State.PROTECTED:
            return min(UNWELL_EVERY_S, self._interval), Trigger.RECHECK
        # Only ever shorter: the server was promised no longer silence than the interval.
        return self._interval * self._rng.uniform(0.9, 1.0), Trigger.TIMER


class Pace:
    """How soon a trigger may start a round; no clock of its own. A round that was on the schedule does not count."""

    def __init__(self) -> None:
        self._full = float("-inf")  # when as many as MAX_BURST may start at once again

    def wait(self, now: float) -> float:
        """Seconds until the next may start."""
        return max(0.0, self._full - (MAX_BURST - 1) * BURST_GAP_S - now)

    def started(self, now: float) -> None:
        self._full = max(self._full, now) + BURST_GAP_S


class Scheduler:
    """`look` runs one round; `done` gets each observation with its verdict. What came of it is kept in `state`."""

    def __init__(
        self,
        look: Callable[[Trigger, Policy], Coroutine[Any, Any, Observation]],
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
        """`paused` is called when this process did not run for a while: what waited then is of no worth."""
        self._look = look
        self._done = done
        self._triggers = triggers
        self._state = state
        self._clock = clock
        self._judge = judge
        self._sleep = sleep
        self._limit = limit
        self._pauses = Pauses(clock.boottime, paused)
        self._broken = ""
        self._schedule = Schedule(interval, rng)
        self._pace = Pace()

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
            self._conclude(seen)
            trigger = await self._next(started)

    async def _round(self, trigger: Trigger, *, may_cut: bool) -> Observation | None:
        """Look once; None when a change came in between, or this process did not run for a while."""
        began = self._clock.boottime()
        async with asyncio.TaskGroup() as group:
            looking = group.create_task(self._whole(trigger))
            waiting = group.create_task(self._triggers.wait(lambda came: _cuts(came, trigger)))
            await asyncio.wait([looking, waiting] if may_cut else [looking], return_when=asyncio.FIRST_COMPLETED)
            if not looking.done():
                looking.cancel()
            waiting.cancel()
        # Its waits ended while nobody could read an answer. Not twice in a row: a machine that is always late is heard.
        if looking.cancelled() or (may_cut and self._pauses.ended_since(began)):
            return None
        return looking.result()

    async def _whole(self, trigger: Trigger) -> Observation:
        """One round to its end; one that has none becomes an observation that says so."""
        broken = None
        try:
            async with asyncio.timeout(self._limit) as limit:
                seen = await self._look(trigger, self._state.policy)
        except Exception as e:  # noqa: BLE001 - whatever it is, it is told, and logged below
            broken = e
            reason = f"a round did not end within {self._limit:g} s" if limit.expired() else _reason(e)
            seen = Observation(trigger=trigger, broken=reason)
        if seen.broken != self._broken:
            self._broken = seen.broken
            if broken is not None:
                log.error("a round broke", extra={"reason": seen.broken}, exc_info=broken)
            else:
                log.info("rounds are made again")
        return seen

    def _conclude(self, seen: Observation) -> None:
        self._state.policy = learned_home(seen, self._state.policy)
        verdict = self._judge(seen, self._state.policy)
        self._say(verdict)
        self._state.verdict = verdict
        if not seen.broken:
            self._state.last_success = self._clock.boottime()
        self._done(seen, verdict)

    def _say(self, verdict: Verdict) -> None:
        codes = {f.code for f in verdict.findings}
        old = self._state.verdict
        if old is not None and old.state is verdict.state and codes == {f.code for f in old.findings}:
            return
        level = logging.INFO if verdict.state is State.PROTECTED else logging.WARNING
        reasons = "; ".join(f.message for f in verdict.findings)
        log.log(level, "verdict", extra={"state": verdict.state, "codes": ",".join(sorted(codes)), "why": reasons})

    async def _next(self, started: float) -> Trigger:
        """Wait for what comes first: the schedule, or a trigger."""
        wait, trigger = self._schedule.after(self._state.state or State.UNKNOWN)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, started + wait - self._clock.boottime())):
                await self._triggers.wait()
        came = self._triggers.take()
        if came is None:
            return trigger
        await self._sleep(self._pace.wait(self._clock.boottime()))
        self._pace.started(self._clock.boottime())
        return self._triggers.take() or came


def _cuts(came: Trigger, begun_by: Trigger) -> bool:
    """Whether a round that `begun_by` started is of no worth once `came` is known."""
    return came in _CHANGES or begun_by in _ON_TIME or not outweighs(begun_by, came)


def _reason(error: BaseException) -> str:
    """The first cause of a group of errors, in one line that the wire takes."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return "".join(c if c.isprintable() else " " for c in text)[:_MAX_REASON_CHARS]
