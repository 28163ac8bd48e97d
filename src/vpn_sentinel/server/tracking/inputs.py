"""The tracker's inputs: reports of agents and old clients, and what the server found out by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from vpn_sentinel.domain.observation import Observation, PortCheck
from vpn_sentinel.domain.policy import IPAddress, Policy

_MAX_TRANSIT_S: Final = 30.0  # the longest that a message may take from the agent to here


class TimedObservation(msgspec.Struct, frozen=True, kw_only=True):
    """One observation on its way into the database; `at` is when it was seen, by the server's clock."""

    seq: int
    at: float
    observation: Observation


class ReportBatch(msgspec.Struct, frozen=True, kw_only=True):
    """The content of one message about one tunnel. `spool` is the agent's; a keepalive has none and is numbered here.

    `silent_after` is how many seconds without a further message make the tunnel silent. `caught_up` is False while the
    agent still holds later observations. `skew` is the sender's clock minus ours, in seconds; `connected_at` is the
    time since which it has been able to send. `peer` is the address that the message came from. `role` and `site`: see
    wire.messages.Hello.
    """

    tunnel: str
    received_at: float
    observations: Sequence[TimedObservation]
    silent_after: float
    interval: float
    version: str
    spool: str | None = None
    policy: Policy | None = None
    caught_up: bool = True
    thinned: int = 0
    skew: float | None = None
    connected_at: float = 0.0
    dns_loc: str = ""
    dns_colo: str = ""
    peer: IPAddress | None = None
    role: str = "tunnel"
    site: str = ""

    def name_of_spool(self, stored: str, seq: int) -> str:
        """The spool name that its rounds are stored under; the database holds the spool `stored` up to number `seq`.

        Two hosts may be copies of one image: both have the same spool name and number their own rounds in it. The one
        with the lower numbers would look like a repetition, and none of its rounds would be judged. But a round that
        was made during a session can be in the database only if this session brought it; so such rounds get another
        spool name.
        """
        if self.spool is None:
            return "keepalive"
        repeats = self.spool == stored and self.connected_at and all(item.seq <= seq for item in self.observations)
        during = self.connected_at + _MAX_TRANSIT_S
        return f"{self.spool}'" if repeats and any(i.at > during for i in self.observations) else self.spool


@dataclass(frozen=True, slots=True, kw_only=True)
class PulseObservation:
    """What the server itself sees of a tunnel's pulses at the time `at` (seconds since the epoch).

    They come from `address`; `unheard` says that they have come for a while without the agent receiving the replies.
    Submit one when either changes, and again every few seconds while `unheard` lasts. Only trouble is stored. It has no
    effect for a name without a tunnel, nor for a reference agent.
    """

    tunnel: str
    address: IPAddress
    unheard: bool
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PortCheckResult:
    """How the attempt to reach a tunnel's forwarded port ended, at the time `at`.

    The agent's next observations are judged with it. It has no effect for a name without a tunnel.
    """

    tunnel: str
    check: PortCheck
    at: float


Input = ReportBatch | PulseObservation | PortCheckResult


def moved(item: Input, by: float) -> Input:
    """The same input after the clock was set forward by `by` seconds."""
    if not isinstance(item, ReportBatch):
        return replace(item, at=item.at + by)
    seen = tuple(msgspec.structs.replace(o, at=o.at + by) for o in item.observations)
    times = {"received_at": item.received_at + by, "connected_at": item.connected_at + by}
    return msgspec.structs.replace(item, observations=seen, **times)
