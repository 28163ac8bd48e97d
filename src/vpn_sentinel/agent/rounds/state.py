"""What the rounds have come to so far: written by the scheduler, read by sensors, health and the next round."""

from collections.abc import Iterable
from dataclasses import dataclass

from vpn_sentinel.domain.policy import IPNetwork, Policy
from vpn_sentinel.domain.verdict import State, Verdict


@dataclass(slots=True)
class RoundState:
    """`policy` is what is judged by here, with the home networks that were learned; `last_success` when a round came to
    its end, in seconds by the clock `boottime`.
    """

    policy: Policy
    verdict: Verdict | None = None
    last_success: float | None = None

    @property
    def state(self) -> State | None:
        """None before the first round."""
        return None if self.verdict is None else self.verdict.state

    def learn_home(self, networks: Iterable[IPNetwork]) -> None:
        """Judge by these home networks too, which somebody else remembers."""
        self.policy = self.policy.with_home(networks)
