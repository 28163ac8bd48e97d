"""What a round finds out beside its canaries, while they are on their way: claims, a captive portal, flaky targets.

None of it makes a round longer: the claims are there in milliseconds or left out, and a portal is looked for only when
nothing answers and the reserve is being asked.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Final

from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.agent.probes.canary import CanaryPlan
from vpn_sentinel.agent.probes.target_health import TargetHealth
from vpn_sentinel.domain.observation import Answer, Canary, Claim, Observation, Probe

_CLAIMS_EXTRA_S: Final = 0.2  # seconds that claims get beyond the canaries
_ECHO: Final = "echo"  # our own server's: when it stays silent, that is told as such

Claims = Callable[[Survey], Coroutine[Any, Any, tuple[Claim, ...]]]
# Looks for a portal beside the tunnel, through the interface of this name: see probes.portal.
Portal = Callable[[str], Coroutine[Any, Any, bool | None]]


async def _nobody(_survey: Survey) -> tuple[Claim, ...]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SideProbes:
    """Whom to ask; lives as long as the agent."""

    claims: Claims = _nobody
    forwarded_port: Callable[[], int | None] = lambda: None
    portal: Portal | None = None
    target_health: TargetHealth = field(default_factory=TargetHealth)

    def begin(self, group: asyncio.TaskGroup, survey: Survey) -> "SideProbing":
        """Start what is asked in any case."""
        return SideProbing(self, group, survey)


class SideProbing:
    """One round's share."""

    def __init__(self, side_probes: SideProbes, group: asyncio.TaskGroup, survey: Survey) -> None:
        self._probes = side_probes
        self._group = group
        self._survey = survey
        self._claiming = group.create_task(side_probes.claims(survey))
        self._portal: asyncio.Task[bool | None] | None = None
        self._asked: tuple[tuple[str, int], ...] = ()

    def with_suspects(self, plan: CanaryPlan) -> CanaryPlan:
        """The same with its suspects."""
        self._asked = tuple((t.name, t.address.version) for t in plan.targets if t.name != _ECHO)
        return replace(plan, suspects=self._probes.target_health.suspects())

    def silence(self, back: tuple[Canary, ...]) -> None:
        """Nothing has answered on the default route. Behind a kill switch a TCP connection would only hang."""
        beside = {c.answer for c in back if c.probe is Probe.PHYSICAL}
        physical = self._survey.physical
        # On its way still is good enough: a refusal comes at once.
        if (
            self._probes.portal
            and physical
            and self._survey.tunnel
            and Answer.BLOCKED not in beside
            and beside != {Answer.UNKNOWN}
        ):
            self._portal = self._group.create_task(self._probes.portal(physical.name))

    async def add(self, seen: Observation, *, hurry: bool) -> Observation:
        """What was found out, put into the observation. With `hurry` nothing is waited for."""
        dead = not any(c.answer is Answer.ANSWERED for c in seen.asked(Probe.DEFAULT))
        await asyncio.wait([self._claiming], timeout=0 if hurry else _CLAIMS_EXTRA_S)
        found = None
        if self._portal is not None:
            if dead:
                found = await self._portal
            self._portal.cancel()
        claims = self._claiming.result() if self._claiming.done() else ()
        self._claiming.cancel()
        return replace(
            seen,
            claims=claims,
            forwarded_port=self._probes.forwarded_port(),
            portal=found,
            flaky=self._probes.target_health.saw(self._asked, seen.canaries),
        )
