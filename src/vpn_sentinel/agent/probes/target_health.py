"""Which canary targets stay silent while others answer (situation 35): a site that shuns VPN exits, not a fault.

A round does not wait for a target when another of its family has answered, so such a silence says nothing yet. It makes
the target a suspect, and the next rounds wait for it.
"""

from collections.abc import Iterable, Set
from typing import Final

from vpn_sentinel.domain.observation import Answer, Canary, Probe

Key = tuple[str, int]  # target and family

LOST: Final = 3  # rounds in a row
AGAIN: Final = 10  # rounds until one that is known as flaky is waited for again


class TargetHealth:
    """What consecutive rounds say of each target; no I/O."""

    def __init__(self) -> None:
        self._lost: dict[Key, int] = {}
        self._round = 0

    def suspects(self) -> Set[Key]:
        """Those whose answer is worth waiting for in the round that begins."""
        self._round += 1
        return {key for key, lost in self._lost.items() if lost < LOST or self._round % AGAIN == 0}

    def saw(self, asked: Iterable[Key], canaries: tuple[Canary, ...]) -> tuple[str, ...]:
        """Take in a round's canaries; `asked` are the targets of C1 that it sent. Returns the flaky ones' names."""
        answers = {(c.target, c.family): c.answer for c in canaries if c.probe is Probe.DEFAULT}
        answered = {key for key, answer in answers.items() if answer is Answer.ANSWERED}
        for key in asked:
            if key in answered:
                self._lost.pop(key, None)
            elif not any(family == key[1] for _, family in answered):
                continue  # all of the family are silent: that is not this target's doing
            elif key not in answers:
                self._lost.setdefault(key, 0)
            elif answers[key] is Answer.LOST:
                self._lost[key] = self._lost.get(key, 0) + 1
        return tuple(dict.fromkeys(name for (name, _), lost in self._lost.items() if lost >= LOST))
