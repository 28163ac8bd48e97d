"""What agent and server say to each other, over the WebSocket `/api/v1/agent` and by POST to the same path.

The agent says `Hello` once, then `Reports` whenever its spool holds some. The server says `Welcome`, then one `Ack`
for each message of reports, *after* the database committed them: what an agent has an ack for, it may forget.
By POST, `Exchange` carries both at once and is answered by `Welcome`, whose `ack` covers the reports sent along.
"""

from hashlib import blake2s
from typing import Final

import msgspec

from vpn_sentinel.domain.observation import Observation
from vpn_sentinel.domain.policy import IPNetwork, Policy

# Of this protocol. A server takes every version up to its own; an agent says which one it speaks.
PROTOCOL: Final = 1


# Header of a refusal by POST, with the fingerprint of the body that was refused.
REFUSED_HEADER: Final = "vpn-sentinel-refused"


def fingerprint(message: bytes) -> str:
    """32 hex digits by which a sender knows that what was refused is what it sent, and not altered on the way."""
    return blake2s(message, digest_size=16).hexdigest()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One observation as the spool kept it.

    `seq` counts up from 1 within one spool and has gaps where rounds were thinned. `age` is the time in seconds since
    it was seen, by a clock that never jumps, so that a wrong wall clock at the agent cannot misdate it.
    """

    seq: int
    age: float
    observation: Observation


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """Who reports. `spool` is the random identity of the agent's spool: sequence numbers belong to it.

    `interval` is the longest time in seconds between two reports of an agent that is well; `wall` its clock.
    `role` is "tunnel", or "reference" for an agent that runs outside the tunnels of the same `site`; "" is no site.
    """

    protocol: int
    client_id: str
    spool: str
    version: str
    interval: float
    wall: float
    policy: Policy = msgspec.field(default_factory=Policy)
    role: str = "tunnel"
    site: str = ""


class Reports(msgspec.Struct, frozen=True, kw_only=True, tag="reports"):
    """Observations in order. `pending` more wait in the spool; `thinned` were given up since the last message."""

    items: list[Report]
    pending: int = 0
    thinned: int = 0


class Exchange(msgspec.Struct, frozen=True, kw_only=True, tag="exchange"):
    hello: Hello
    reports: Reports


class Echo(msgspec.Struct, frozen=True, kw_only=True):
    """How to ask the server's UDP echo: who asks (`id`, 16 hex digits) and the `key` (64 hex digits) that signs it.

    Raises ValueError for what cannot be asked with.
    """

    port: int
    id: str
    key: str

    def __post_init__(self) -> None:
        if not (0 < self.port < 2**16 and len(bytes.fromhex(self.id)) == 8 and len(bytes.fromhex(self.key)) == 32):
            msg = "a port, 16 and 64 hex digits are needed"
            raise ValueError(msg)


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What the server remembers of a tunnel that worked: its `device` and those `beside` it, by name, and the `home`
    networks that were learned. For an agent that lost its own memory; one that has some believes that."""

    device: str
    beside: tuple[str, ...] = ()
    home: tuple[IPNetwork, ...] = ()


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """`ack` is the highest sequence number of this spool that is stored, 0 for none; `seen_from` the peer address.

    `canary_zone` is the DNS zone that this server is authoritative for, without a dot at its end; None without one.
    """

    ack: int
    wall: float
    seen_from: str | None = None
    echo: Echo | None = None
    canary_zone: str | None = None
    known: Known | None = None


class Ack(msgspec.Struct, frozen=True, kw_only=True, tag="ack"):
    seq: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """Said before the server closes. `retry` is False when trying again cannot help.

    `of` is the fingerprint of the message of reports that is refused, "" when the refusal is about something else.
    """

    reason: str
    retry: bool = False
    of: str = ""


FromAgent = Hello | Reports | Exchange
FromServer = Welcome | Ack | Refused
