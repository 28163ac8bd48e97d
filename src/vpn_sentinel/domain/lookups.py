"""Whether names can be looked up: by this host's nameservers, and by the system's resolver as programs use it."""

from collections.abc import Iterator
from typing import Final

from vpn_sentinel.domain.observation import Answer, Observation
from vpn_sentinel.domain.verdict import Code, Finding

_NO_ANSWER: Final = (Answer.LOST, Answer.UNREACHABLE, Answer.BLOCKED)


def all_dead(seen: Observation) -> bool:
    """Whether nameservers were asked and none answered."""
    return bool(seen.resolvers) and all(s.answer in _NO_ANSWER for s in seen.resolvers)


def lookup_failures(seen: Observation) -> Iterator[Finding]:
    """Findings from the nameservers and getaddrinfo(3) together; none when neither fails."""
    servers = ", ".join(sorted({str(s.nameserver) for s in seen.resolvers}))
    facts = {"nameservers": servers} if servers else {}
    lookup = seen.system_lookup
    if lookup is not None:
        if lookup.error or lookup.answer is not Answer.UNKNOWN:
            facts |= {"system": lookup.error or str(lookup.answer)}
        if lookup.upstreams:
            facts |= {"upstreams": ", ".join(map(str, lookup.upstreams))}
    if all_dead(seen):
        if lookup is not None and lookup.answer is Answer.ANSWERED:
            if not lookup.egress:
                yield Finding(
                    Code.RESOLVER_UNKNOWN,
                    f"Programs can look names up here, though no nameserver of resolv.conf answers in time "
                    f"({servers}): which resolver they use could not be seen.",
                    facts,
                )
            return
        yield Finding(Code.DNS_DOWN, f"No nameserver answers in time: {servers}.", facts)
    elif lookup is not None and lookup.answer in _NO_ANSWER:
        beside = f", though {servers} answers when asked directly" if servers else ""
        reason = lookup.error or lookup.answer
        yield Finding(
            Code.DNS_DOWN,
            f"Programs cannot look names up here: the system's resolver fails ({reason}){beside}.",
            facts,
        )
