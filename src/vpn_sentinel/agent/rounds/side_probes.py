"""What a round finds out while its canaries are in flight: claims, a captive portal, flaky targets.

None of it makes a round longer: claims come within milliseconds or are left out, and a portal is searched for only when
nothing answers and the reserve targets are being asked.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Final

from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.agent.probes.canary import CanaryPlan
from vpn_sentinel.agent.probes.target_health import TargetHealth
from vpn_sentinel.domain.observation import Answer, Canary, Claim, Observation, Probe

_CLAIMS_EXTRA_S: Final = 0.2  # the time for claims after the canaries
_ECHO: Final = "echo"  # the server's own: its silence is reported separately

Claims = Callable[[Survey], Coroutine[Any, Any, tuple[Claim, ...]]]
# Searches for a captive portal outside the tunnel, through the interface of this name: see probes.portal.
Portal = Callable[[str], Coroutine[Any, Any, bool | None]]


async def _no_claims(_survey: Survey) -> tuple[Claim, ...]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SideProbes:
    """What to ask; it lives as long as the agent."""

    claims: Claims = _no_claims
    forwarded_port: Callable[[], int | None] = lambda: None
    portal: Portal | None = None
    target_health: TargetHealth = field(default_factory=TargetHealth)

    def begin(self, group: asyncio.TaskGroup, survey: Survey) -> "SideProbing":
        """Start the probes of every round."""
        return SideProbing(self, group, survey)


class SideProbing:
    """The side probes of one round."""

    def __init__(self, side_probes: SideProbes, group: asyncio.TaskGroup, survey: Survey) -> None:
        self._probes = side_probes
        self._group = group
        self._survey = survey
        self._claiming = group.create_task(side_probes.claims(survey))
        self._portal: asyncio.Task[bool | None] | None = None
        self._asked: tuple[tuple[str, int], ...] = ()

    def with_suspects(self, plan: CanaryPlan) -> CanaryPlan:
        """The plan with its suspects: targets that have been flaky."""
        self._asked = tuple((t.name, t.address.version) for t in plan.targets if t.name != _ECHO)
        return replace(plan, suspects=self._probes.target_health.suspects())

    def silence(self, answered: tuple[Canary, ...]) -> None:
        """Search for a portal, as nothing has answered on the default route. Behind a kill switch a connection would
        hang.
        """
        physical_answers = {c.answer for c in answered if c.probe is Probe.PHYSICAL}
        physical = self._survey.physical
        # A physical canary without a result yet is enough: a refusal by a kill switch comes at once.
        if (
            self._probes.portal
            and physical
            and self._survey.tunnel
            and Answer.BLOCKED not in physical_answers
            and physical_answers != {Answer.UNKNOWN}
        ):
            self._portal = self._group.create_task(self._probes.portal(physical.name))

    async def add(self, seen: Observation, *, hurry: bool) -> Observation:
        """The observation with the results. With `hurry` it waits for nothing."""
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
