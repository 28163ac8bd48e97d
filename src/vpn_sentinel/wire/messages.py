"""The messages between agent and server, over the WebSocket `/api/v1/agent` and by POST to the same path.

The agent sends `Hello` once, then `Reports` whenever its spool holds some. The server sends `Welcome`, then one `Ack`
for each message of reports, *after* the database committed them: an agent may delete what is acknowledged.
By POST, `Exchange` carries both at once; the response is `Welcome`, whose `ack` covers the reports of the request.
"""

from hashlib import blake2s
from typing import Final

import msgspec

from vpn_sentinel.domain.observation import Observation
from vpn_sentinel.domain.policy import IPNetwork, Policy

# The version of this protocol. A server accepts every version up to its own; an agent sends its own.
PROTOCOL: Final = 1


# Header of a refusal by POST, with the fingerprint of the body that was refused.
REFUSED_HEADER: Final = "vpn-sentinel-refused"


def fingerprint(message: bytes) -> str:
    """32 hex digits by which a sender checks that the refused message is the one it sent, unaltered."""
    return blake2s(message, digest_size=16).hexdigest()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One observation as the spool kept it.

    `seq` counts up from 1 within one spool and has gaps where rounds were thinned. `age` is the time in seconds since
    the observation, by a monotonic clock, so that a wrong wall clock at the agent cannot misdate it.
    """

    seq: int
    age: float
    observation: Observation


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The agent that reports. `spool` is the random identity of its spool: sequence numbers belong to it.

    `interval` is the longest time in seconds between two reports of a working agent; `wall` is the agent's clock.
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
    """Observations in order. `pending` more wait in the spool; `thinned` were dropped since the last message."""

    items: list[Report]
    pending: int = 0
    thinned: int = 0


class Exchange(msgspec.Struct, frozen=True, kw_only=True, tag="exchange"):
    hello: Hello
    reports: Reports


class Echo(msgspec.Struct, frozen=True, kw_only=True):
    """How to ask the server's UDP echo: the agent's `id` (16 hex digits) and the `key` (64 hex digits) of its MAC.

    Raises ValueError for invalid values.
    """

    port: int
    id: str
    key: str

    def __post_init__(self) -> None:
        if not (0 < self.port < 2**16 and len(bytes.fromhex(self.id)) == 8 and len(bytes.fromhex(self.key)) == 32):
            msg = "a port, 16 and 64 hex digits are needed"
            raise ValueError(msg)


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What the server remembers of a tunnel that worked: the names of its `device` and of the other interfaces
    (`beside`), and the learned `home` networks. For an agent that lost its own memory; one that has it uses its own.
    """

    device: str
    beside: tuple[str, ...] = ()
    home: tuple[IPNetwork, ...] = ()


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """`ack` is the highest stored sequence number of this spool, 0 for none; `seen_from` is the peer address.

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
    """Sent before the server closes. `retry` is False when trying again cannot help.

    `of` is the fingerprint of the message of reports that is refused, "" when the refusal is about something else.
    """

    reason: str
    retry: bool = False
    of: str = ""


FromAgent = Hello | Reports | Exchange
FromServer = Welcome | Ack | Refused
