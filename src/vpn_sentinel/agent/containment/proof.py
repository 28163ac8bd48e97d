"""What leaked, and what proves that it does not leak any more. Pure.

While traffic outside the tunnel is blocked, no leak can be seen, so "no leak is seen" proves nothing: what leaked must
be seen in the tunnel, or be routed there.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel.domain.leaks import DNS_PORTS
from vpn_sentinel.domain.observation import Answer, Escape, Observation, Path, Probe
from vpn_sentinel.domain.policy import IPAddress, Policy
from vpn_sentinel.domain.verdict import Code, State, Verdict
from vpn_sentinel.wire import codec

_MAX_DESTINATIONS: Final = 32
_UNPROVEN: Final = frozenset({State.LEAKING, State.DOWN, State.UNKNOWN})
_FAMILY_OF_LEAK: Final = {Code.IP_LEAK: 4, Code.IPV6_LEAK: 6}
PathOf = Callable[[IPAddress, int, str], Path]  # of an address, port (0: any) and protocol ("udp", "tcp", …)


@dataclass(frozen=True, slots=True)
class Flow:
    """A destination that packets left for outside the tunnel."""

    address: IPAddress
    port: int
    protocol: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """The IP versions, nameservers and destinations that leaked."""

    families: frozenset[int] = frozenset()
    nameservers: frozenset[IPAddress] = frozenset()
    flows: frozenset[Flow] = field(default=frozenset())

    def __or__(self, other: "Cause") -> "Cause":
        flows = sorted(self.flows | other.flows, key=str)[:_MAX_DESTINATIONS]
        return Cause(
            families=self.families | other.families,
            nameservers=self.nameservers | other.nameservers,
            flows=frozenset(flows),
        )


def cause_of(seen: Observation, verdict: Verdict, policy: Policy) -> Cause:
    """What leaked, by the findings of a verdict *leaking* and the escapes of its observation."""
    families, nameservers = set[int](), set[IPAddress]()
    for finding in verdict.findings:
        if finding.code in _FAMILY_OF_LEAK:
            families.add(_FAMILY_OF_LEAK[finding.code])
        elif finding.code is Code.SPLIT_ROUTE and "address" in finding.evidence:
            families.add(codec.address(finding.evidence["address"]).version)
        elif finding.code is Code.DNS_LEAK and "nameserver" in finding.evidence:
            nameservers.add(codec.address(finding.evidence["nameserver"]))
    escapes = (e for e in seen.escapes if not policy.allows_outside(e.destination))
    flows = {Flow(e.destination, e.destination_port or 0, e.protocol) for e in escapes if not _allowed_name(e, policy)}
    return Cause(families=frozenset(families), nameservers=frozenset(nameservers), flows=frozenset(flows))


def _allowed_name(escape: Escape, policy: Policy) -> bool:
    return escape.destination_port in DNS_PORTS and policy.allows_resolver(escape.destination)


def proven(seen: Observation, verdict: Verdict, cause: Cause, path_of: PathOf) -> bool:
    """Whether this round shows that the tunnel works and that everything that leaked goes through it."""
    if verdict.state in _UNPROVEN or seen.link is None or not (seen.link.present and seen.link.up):
        return False
    canaries = seen.asked(Probe.DEFAULT)
    if not any(c.answer is Answer.ANSWERED and c.address and c.path is Path.TUNNEL for c in canaries):
        return False
    if any(c.path is Path.OUTSIDE for c in canaries if c.family in cause.families):
        return False
    if cause.nameservers and not _resolvers_work(seen, cause):
        return False
    return all(path_of(f.address, f.port, f.protocol) is not Path.OUTSIDE for f in cause.flows)


def _resolvers_work(seen: Observation, cause: Cause) -> bool:
    """Whether names resolve again: each nameserver that leaked answers (the rules block others) or is not used any
    more.
    """
    if not any(s.answer is Answer.ANSWERED for s in seen.resolvers):
        return False
    return all(s.answer is Answer.ANSWERED for s in seen.resolvers if s.nameserver in cause.nameservers)


def to_text(cause: Cause) -> str:
    """A cause as JSON, as it is kept over restarts."""
    return json.dumps(
        {
            "families": sorted(cause.families),
            "nameservers": sorted(str(a) for a in cause.nameservers),
            "flows": sorted([str(f.address), f.port, f.protocol] for f in cause.flows),
        }
    )


def from_text(text: str | None) -> Cause:
    """The reverse of `to_text`; text that cannot be read gives an empty cause."""
    try:
        found = json.loads(text or "{}")
        return Cause(
            families=frozenset(int(f) for f in found.get("families", ())),
            nameservers=frozenset(codec.address(a) for a in found.get("nameservers", ())),
            flows=frozenset(Flow(codec.address(a), int(port), str(p)) for a, port, p in found.get("flows", ())),
        )
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return Cause()
