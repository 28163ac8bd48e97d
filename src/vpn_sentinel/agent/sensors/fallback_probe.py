"""Which target to probe between rounds, and what the answers of public services mean when the server's echo fails.

Two probes lost in a row, an answer with another address, or an answer after a loss are a reason for a round.
"""

from collections.abc import Callable, Sequence
from typing import Final

from vpn_sentinel.agent.probes.targets import CLOUDFLARE, OPENDNS, Target
from vpn_sentinel.domain.observation import Answer, Canary, Observation, Probe

EVERY_S: Final = 5.0  # between probes of a public service
_LOST_IN_A_ROW: Final = 2


class FallbackProbes:
    """Evaluates the answers of consecutive probes; no I/O."""

    def __init__(self) -> None:
        self._lost = 0
        self._addresses: dict[tuple[str, int], object] = {}

    def start_from(self, seen: Sequence[Canary]) -> None:
        """Take over the addresses that a round saw, so that the same answer to the next probe is no change."""
        for canary in seen:
            if canary.probe is Probe.DEFAULT and canary.address is not None:
                self._addresses[canary.target, canary.family] = canary.address

    def note(self, canary: Canary) -> bool:
        """Whether this probe is a reason for a round."""
        if canary.answer is not Answer.ANSWERED:
            self._lost += 1
            return self._lost == _LOST_IN_A_ROW
        was_lost, self._lost = self._lost >= _LOST_IN_A_ROW, 0
        return self.moved(canary) or was_lost

    def moved(self, canary: Canary) -> bool:
        """Whether an answer has another address than the target's last one."""
        if canary.address is None:
            return False
        key = (canary.target, canary.family)
        old = self._addresses.get(key)
        self._addresses[key] = canary.address
        return old is not None and old != canary.address

    @property
    def in_doubt(self) -> bool:
        """One probe is lost: the next should be sent at once."""
        return self._lost == 1


def choose(
    echoes: Sequence[Target], seen: Observation | None, fits: Callable[[Target], bool] = lambda _: True
) -> Target:
    """The target: the server's echo, unless the last round shows that others answer and it does not.

    A server that is down must not look like a tunnel that is. `fits` is whether a target is reached by the tunnel.
    """
    canaries = seen.asked(Probe.DEFAULT) if seen is not None else ()
    asked = {(c.target, c.family) for c in canaries}
    answering = {(c.target, c.family) for c in canaries if c.answer is Answer.ANSWERED}
    suitable = [t for t in echoes if fits(t)]
    for target in suitable:
        if _key(target) in answering:
            return target
    for target in suitable:
        # Where nothing answers, the server may still receive our packets, and reports that.
        if _key(target) not in asked or not answering:
            return target
    return next((t for t in (*CLOUDFLARE, *OPENDNS) if _key(t) in answering), CLOUDFLARE[0])


def _key(target: Target) -> tuple[str, int]:
    return target.name, target.address.version
