"""The beat: one light canary every few seconds, so that a tunnel that dies without a word is noticed.

Two beats lost in a row, an answer that comes from elsewhere, or answers that come back after a loss start a round.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from vpn_sentinel.agent.probes.canary import one
from vpn_sentinel.agent.probes.targets import CLOUDFLARE, OPENDNS, Target
from vpn_sentinel.domain.observation import Answer, Canary, Observation, Path, Probe

LITERAL: Final = 5.0  # seconds between beats to a service of strangers
_LOST: Final = 2


class Rhythm:
    """What the answers of consecutive beats mean; no I/O."""

    def __init__(self) -> None:
        self._lost = 0
        self._addresses: dict[tuple[str, int], object] = {}

    def start_from(self, seen: Sequence[Canary]) -> None:
        """Take over what a round saw, so that the same answer is no news to the next beat."""
        for canary in seen:
            if canary.probe is Probe.DEFAULT and canary.address is not None:
                self._addresses[canary.target, canary.family] = canary.address

    def beat(self, canary: Canary) -> bool:
        """Whether this beat is a reason for a round."""
        if canary.answer is not Answer.ANSWERED:
            self._lost += 1
            return self._lost == _LOST
        was_lost, self._lost = self._lost >= _LOST, 0
        if canary.address is None:
            return was_lost
        key = (canary.target, canary.family)
        old = self._addresses.get(key)
        self._addresses[key] = canary.address
        return was_lost or (old is not None and old != canary.address)

    @property
    def in_doubt(self) -> bool:
        """One is lost: the next should not wait."""
        return self._lost == 1


def choose(echoes: Sequence[Target], seen: Observation | None) -> Target:
    """Whom to ask: the server's echo, as long as rounds show that it answers, else a literal address.

    A server that is down must not look like a tunnel that is.
    """
    if seen is None:
        return CLOUDFLARE[0]
    answering = {(c.target, c.family) for c in seen.asked(Probe.DEFAULT) if c.answer is Answer.ANSWERED}
    candidates = (*echoes, *CLOUDFLARE, *OPENDNS)
    return next((t for t in candidates if (t.name, t.address.version) in answering), CLOUDFLARE[0])


class Beat:
    def __init__(
        self,
        pulse: float,
        *,
        echoes: Callable[[], Sequence[Target]],
        ring: Callable[[], None],
    ) -> None:
        """`pulse` is seconds between beats to our own server."""
        self._pulse = pulse
        self._echoes = echoes
        self._ring = ring
        self._rhythm = Rhythm()
        self._seen: Observation | None = None

    def saw(self, seen: Observation) -> None:
        """A round is over."""
        self._seen = seen
        self._rhythm.start_from(seen.canaries)

    async def run(self) -> None:
        while True:
            target = choose(self._echoes(), self._seen)
            pulse = self._pulse if target.name == "echo" else max(self._pulse, LITERAL)
            await asyncio.sleep(0 if self._rhythm.in_doubt else pulse)
            if self._rhythm.beat(await one(target, Path.UNKNOWN)):  # what it means is the round's to find out
                self._ring()
