"""Which canary targets do not answer while others do (situation 35): a site that refuses VPN exits, not a fault.

A round does not wait for a target when another of its family has answered, so a missing answer is no result yet. It
makes the target a suspect, and the next rounds wait for it.
"""

from collections.abc import Iterable, Set
from typing import Final

from vpn_sentinel.domain.observation import Answer, Canary, Probe

Key = tuple[str, int]  # target and family

FLAKY_AFTER_ROUNDS: Final = 3  # in a row without an answer
RECHECK_EVERY_ROUNDS: Final = 10  # then a round waits for a flaky target again


class TargetHealth:
    """The result of consecutive rounds for each target; no I/O."""

    def __init__(self) -> None:
        self._lost: dict[Key, int] = {}
        self._round = 0

    def suspects(self) -> Set[Key]:
        """The targets that the round which begins should wait for."""
        self._round += 1
        return {
            key
            for key, lost in self._lost.items()
            if lost < FLAKY_AFTER_ROUNDS or self._round % RECHECK_EVERY_ROUNDS == 0
        }

    def saw(self, asked: Iterable[Key], canaries: tuple[Canary, ...]) -> tuple[str, ...]:
        """Process the canaries of a round; `asked` are the targets of its C1. Returns the names of flaky targets."""
        answers = {(c.target, c.family): c.answer for c in canaries if c.probe is Probe.DEFAULT}
        answered = {key for key, answer in answers.items() if answer is Answer.ANSWERED}
        for key in asked:
            if key in answered:
                self._lost.pop(key, None)
            elif not any(family == key[1] for _, family in answered):
                continue  # no target of this IP version answers: this target is not the cause
            elif key not in answers:
                self._lost.setdefault(key, 0)
            elif answers[key] is Answer.LOST:
                self._lost[key] = self._lost.get(key, 0) + 1
        return tuple(dict.fromkeys(name for (name, _), lost in self._lost.items() if lost >= FLAKY_AFTER_ROUNDS))
