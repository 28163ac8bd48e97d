"""The result of the rounds so far: written by the scheduler, read by sensors, health and the next round."""

from collections.abc import Iterable
from dataclasses import dataclass

from vpn_sentinel.domain.policy import IPNetwork, Policy
from vpn_sentinel.domain.verdict import State, Verdict


@dataclass(slots=True)
class RoundState:
    """`policy` is the policy of verdicts here, with the learned home networks; `last_success` is when a round last
    ended well, in seconds of the clock `boottime`.
    """

    policy: Policy
    verdict: Verdict | None = None
    last_success: float | None = None

    @property
    def state(self) -> State | None:
        """None before the first round."""
        return None if self.verdict is None else self.verdict.state

    def learn_home(self, networks: Iterable[IPNetwork]) -> None:
        """Add home networks that the server remembers."""
        self.policy = self.policy.with_home(networks)
