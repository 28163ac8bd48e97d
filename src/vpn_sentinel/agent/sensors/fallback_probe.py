"""Whom to ask for a sign of life, and what the answers of strangers mean when the server's echo cannot be asked.

Two probes lost in a row, an answer that comes from elsewhere, or answers that come back after a loss are a reason
to look.
"""

from collections.abc import Callable, Sequence
from typing import Final

from vpn_sentinel.agent.probes.targets import CLOUDFLARE, OPENDNS, Target
from vpn_sentinel.domain.observation import Answer, Canary, Observation, Probe

EVERY_S: Final = 5.0  # between probes of a service of strangers
_LOST: Final = 2


class FallbackProbes:
    """What the answers of consecutive probes mean; no I/O."""

    def __init__(self) -> None:
        self._lost = 0
        self._addresses: dict[tuple[str, int], object] = {}

    def start_from(self, seen: Sequence[Canary]) -> None:
        """Take over what a round saw, so that the same answer is no news to the next probe."""
        for canary in seen:
            if canary.probe is Probe.DEFAULT and canary.address is not None:
                self._addresses[canary.target, canary.family] = canary.address

    def note(self, canary: Canary) -> bool:
        """Whether this probe is a reason for a round."""
        if canary.answer is not Answer.ANSWERED:
            self._lost += 1
            return self._lost == _LOST
        was_lost, self._lost = self._lost >= _LOST, 0
        return self.moved(canary) or was_lost

    def moved(self, canary: Canary) -> bool:
        """Whether an answer names another address than the target's last one did."""
        if canary.address is None:
            return False
        key = (canary.target, canary.family)
        old = self._addresses.get(key)
        self._addresses[key] = canary.address
        return old is not None and old != canary.address

    @property
    def in_doubt(self) -> bool:
        """One is lost: the next should not wait."""
        return self._lost == 1


def choose(
    echoes: Sequence[Target], seen: Observation | None, fits: Callable[[Target], bool] = lambda _: True
) -> Target:
    """Whom to ask: the server's echo, unless the last round shows that others answer and it does not.

    A server that is down must not look like a tunnel that is. `fits` is whether the way to it tells of the tunnel.
    """
    canaries = seen.asked(Probe.DEFAULT) if seen is not None else ()
    asked = {(c.target, c.family) for c in canaries}
    answering = {(c.target, c.family) for c in canaries if c.answer is Answer.ANSWERED}
    fitting = [t for t in echoes if fits(t)]
    for target in fitting:
        if _key(target) in answering:
            return target
    for target in fitting:
        # Where nothing answers at all, the server may still hear us, and tells what it sees.
        if _key(target) not in asked or not answering:
            return target
    return next((t for t in (*CLOUDFLARE, *OPENDNS) if _key(t) in answering), CLOUDFLARE[0])


def _key(target: Target) -> tuple[str, int]:
    return target.name, target.address.version
