"""What the agent does about a verdict: containment at once, remedies in parallel, and a log of both for the server.

`Reactions` gets every round; packets that the leak watch saw come through the queue.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from vpn_sentinel.agent.containment.containment import Containment, ContainmentDeps, ContainmentFacts, Mode
from vpn_sentinel.agent.containment.instance_lock import SingleInstanceLock
from vpn_sentinel.agent.containment.nft import Nftables
from vpn_sentinel.agent.containment.proof import cause_of
from vpn_sentinel.agent.containment.surroundings import Surroundings
from vpn_sentinel.agent.containment.table import owner_of
from vpn_sentinel.agent.introspect.settings import IntrospectSettings
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.agent.remedies.settings import ReactionSettings
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import Action, Escape, Observation, Outcome, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State, Verdict
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.wire import limits

if TYPE_CHECKING:
    from vpn_sentinel.agent.remedies.remedies import Remedies

log = logging.getLogger(__name__)


class ActionLog:
    """Actions that wait for the next observation, with the time of each."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: deque[tuple[float, Action]] = deque(maxlen=limits.MAX_PER_OBSERVATION)

    def add(self, name: str, outcome: Outcome, detail: str) -> None:
        short = " ".join(detail.split())[: limits.MAX_TEXT_LENGTH]
        self._waiting.append((self._clock.boottime(), Action(name=name, outcome=outcome, detail=short)))

    def take(self) -> tuple[Action, ...]:
        now = self._clock.boottime()
        found = tuple(replace(action, age=max(0.0, now - at)) for at, action in self._waiting)
        self._waiting.clear()
        return found


class ReactionQueue:
    """Verdicts that wait for a reaction. Made before the leak watch, which adds escapes, and before the reactions."""

    def __init__(self, mode: Mode, survey: Callable[[], Survey], policy: Policy) -> None:
        self._mode = mode
        self._survey = survey
        self._policy = policy
        self._waiting: asyncio.Queue[tuple[Observation, Verdict]] = asyncio.Queue()

    def put(self, seen: Observation, verdict: Verdict) -> None:
        self._waiting.put_nowait((seen, verdict))

    def escaped(self, escape: Escape) -> None:
        """Take a packet that the leak watch saw leave: it is judged alone and at once, without waiting for a round."""
        if self._mode is Mode.OFF:
            return
        seen = Observation(trigger=Trigger.LEAK, link=self._survey().link(), escapes=(escape,))
        verdict = judge(seen, self._policy)
        if verdict.state is State.LEAKING:
            self.put(seen, verdict)

    async def get(self) -> tuple[Observation, Verdict]:
        return await self._waiting.get()


class Reactions:
    """All parts are off by default; then `add_to` and `done` cost almost nothing."""

    def __init__(
        self,
        settings: ReactionSettings,
        queue: ReactionQueue,
        around: Surroundings,
        facts: ContainmentFacts,
        http: Client,
        clock: Clock,
        *,
        client_id: str,
        control: IntrospectSettings,
    ) -> None:
        self._mode = settings.contain
        self._around = around
        self._history = ActionLog(clock)
        self._lock = SingleInstanceLock()
        self._containment = Containment(
            settings.contain,
            client_id,
            facts,
            ContainmentDeps(
                allowed=around.allowed,
                path_of=around.path_of,
                nft=Nftables(),
                owner_of=owner_of,
                take_lock=self._lock.take,
                on_action=self._history.add,
            ),
            clock,
        )
        self._remedies: Remedies | None = None
        if settings.wants_remedies:
            from vpn_sentinel.agent.remedies.build import build_remedies  # it takes a quarter of a megabyte

            self._remedies = build_remedies(
                settings, around.policy, facts, http, clock, self._history.add, client_id=client_id, control=control
            )
        self._queue = queue

    def add_to(self, seen: Observation) -> Observation:
        """The observation with the actions since the last one."""
        contained = self._containment.contained if self._mode is Mode.ON else None
        return replace(seen, contained=contained, actions=self._history.take())

    def done(self, seen: Observation, verdict: Verdict) -> None:
        """Take a round that was judged."""
        if self._mode is Mode.ON and verdict.state is State.PROTECTED:
            with contextlib.suppress(OSError):  # reported when the rules must be made
                self._around.remember()
        self._queue.put(seen, verdict)
        if self._remedies is not None:
            self._remedies.saw(seen, verdict)

    async def run(self) -> None:
        """Run until cancelled. The rules stay in the kernel afterwards."""
        async with asyncio.TaskGroup() as group:
            if self._remedies is not None:
                group.create_task(self._remedies.run())
            await self._containment.start()
            while True:
                seen, verdict = await self._queue.get()
                if verdict.state is State.LEAKING:
                    await self._containment.leaking(cause_of(seen, verdict, self._around.policy))
                else:
                    await self._containment.saw(seen, verdict)

    def close(self) -> None:
        self._lock.leave()
