"""What enters the tracker: reports of agents and old clients, and what the server found out by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from vpn_sentinel.domain.observation import Observation, PortCheck
from vpn_sentinel.domain.policy import IPAddress, Policy

_MAX_TRANSIT_S: Final = 30.0  # that a message may take


class TimedObservation(msgspec.Struct, frozen=True, kw_only=True):
    """One observation on its way into the database; `at` is when it was seen, by the server's clock."""

    seq: int
    at: float
    observation: Observation


class ReportBatch(msgspec.Struct, frozen=True, kw_only=True):
    """What one message brought of one tunnel. `spool` is the agent's; a keepalive has none and is numbered here.

    `silent_after` is how many seconds without a further message make the tunnel silent. `caught_up` is False while the
    agent still holds later observations. `skew` is the sender's clock minus ours; `connected_at` is since when it has
    been able to send. `peer` is the address that the message came from. `role` and `site`: see wire.messages.Hello.
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
        """The name that its rounds are stored under, where the database holds `seq` of the spool `stored`.

        Two hosts may be copies of one: with the same spool, whose numbers both give to rounds of their own. Who is
        behind would be taken for one that repeats itself, and nothing of what it sees would be judged. But what was
        seen during a session is in the database only if this session brought it; so the other's has another name.
        """
        if self.spool is None:
            return "keepalive"
        repeats = self.spool == stored and self.connected_at and all(item.seq <= seq for item in self.observations)
        during = self.connected_at + _MAX_TRANSIT_S
        return f"{self.spool}'" if repeats and any(i.at > during for i in self.observations) else self.spool


@dataclass(frozen=True, slots=True, kw_only=True)
class PulseObservation:
    """What the server itself sees of a tunnel's pulses at the time `at` (seconds since the epoch).

    They come from `address`; `unheard` says that they have come for a while without the agent hearing the replies.
    To be told when either changes, and again every few seconds while `unheard` lasts. Only trouble is stored. Without
    effect for a name that has no tunnel, and for a reference agent.
    """

    tunnel: str
    address: IPAddress
    unheard: bool
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PortCheckResult:
    """How the attempt to reach a tunnel's forwarded port ended, at the time `at`.

    What the agent sees next is judged by it. Without effect for a name that has no tunnel.
    """

    tunnel: str
    check: PortCheck
    at: float


Input = ReportBatch | PulseObservation | PortCheckResult


def moved(entering: Input, by: float) -> Input:
    """The same by a clock that was set forward by so many seconds."""
    if not isinstance(entering, ReportBatch):
        return replace(entering, at=entering.at + by)
    seen = tuple(msgspec.structs.replace(o, at=o.at + by) for o in entering.observations)
    times = {"received_at": entering.received_at + by, "connected_at": entering.connected_at + by}
    return msgspec.structs.replace(entering, observations=seen, **times)
