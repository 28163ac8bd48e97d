"""Whether names can be looked up: by this host's nameservers, and by the system's resolver as programs use it."""

from collections.abc import Iterator
from typing import Final

from vpn_sentinel.domain.observation import Answer, Observation
from vpn_sentinel.domain.verdict import Code, Finding

_NO_ANSWER: Final = (Answer.LOST, Answer.UNREACHABLE, Answer.BLOCKED)


def all_dead(seen: Observation) -> bool:
    """Whether nameservers were asked and none answered."""
    return bool(seen.resolvers) and all(s.answer in _NO_ANSWER for s in seen.resolvers)


def system(seen: Observation) -> Iterator[Finding]:
    """Findings from the nameservers and getaddrinfo(3) together; none when neither fails."""
    servers = ", ".join(sorted({str(s.nameserver) for s in seen.resolvers}))
    facts = {"nameservers": servers} if servers else {}
    used = seen.system_lookup
    if used is not None:
        if used.error or used.answer is not Answer.UNKNOWN:
            facts |= {"system": used.error or str(used.answer)}
        if used.upstreams:
            facts |= {"upstreams": ", ".join(map(str, used.upstreams))}
    if all_dead(seen):
        if used is not None and used.answer is Answer.ANSWERED:
            if not used.egress:
                yield Finding(
                    Code.RESOLVER_UNKNOWN,
                    f"Programs can look names up here, though no nameserver of resolv.conf answers in time "
                    f"({servers}): which resolver they use could not be seen.",
                    facts,
                )
            return
        yield Finding(Code.DNS_DOWN, f"No nameserver answers in time: {servers}.", facts)
    elif used is not None and used.answer in _NO_ANSWER:
        beside = f", though {servers} answers when asked directly" if servers else ""
        yield Finding(
            Code.DNS_DOWN,
            f"Programs cannot look names up here: the system's resolver fails ({used.error or used.answer}){beside}.",
            facts,
        )
