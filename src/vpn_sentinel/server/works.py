"""What enters the tracker: arrivals from agents and old clients, and what the server found out by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from vpn_sentinel.domain.observation import Observation, PortCheck
from vpn_sentinel.domain.policy import IPAddress, Policy

_ON_THE_WAY: Final = 30.0  # seconds that a message may take


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """One observation on its way into the database; `at` is when it was seen, by the server's clock."""

    seq: int
    at: float
    observation: Observation


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """What one message brought of one tunnel. `spool` is the agent's; a keepalive has none and is numbered here.

    `silent_after` is how many seconds without a further message make the tunnel silent. `caught_up` is False while the
    agent still holds later observations. `skew` is the sender's clock minus ours; `connected_at` is since when it has
    been able to send. `peer` is the address that the message came from. `role` and `site`: see wire.messages.Hello.
    """

    tunnel: str
    received_at: float
    observations: Sequence[Stored]
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
        during = self.connected_at + _ON_THE_WAY
        return f"{self.spool}'" if repeats and any(i.at > during for i in self.observations) else self.spool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What the server itself sees of a tunnel's pulses at the time `at` (seconds since the epoch).

    They come from `address`; `unheard` says that they have come for a while without the agent hearing the replies.
    To be told when either changes, and again every few seconds while `unheard` lasts.
    """

    tunnel: str
    address: IPAddress
    unheard: bool
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PortTried:
    """How the attempt to reach a tunnel's forwarded port ended, at the time `at`."""

    tunnel: str
    check: PortCheck
    at: float


Work = Arrival | Sighting | PortTried


def moved(work: Work, by: float) -> Work:
    """The same by a clock that was set forward by so many seconds."""
    if not isinstance(work, Arrival):
        return replace(work, at=work.at + by)
    seen = tuple(msgspec.structs.replace(o, at=o.at + by) for o in work.observations)
    times = {"received_at": work.received_at + by, "connected_at": work.connected_at + by}
    return msgspec.structs.replace(work, observations=seen, **times)
