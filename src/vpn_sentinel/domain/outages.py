"""Why nothing answers: this host's network, the home, the tunnel's interface, the VPN server, or beyond it."""

from collections.abc import Iterator, Mapping

from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Probe
from vpn_sentinel.domain.verdict import Code, Finding


def why_dead(seen: Observation) -> Iterator[Finding]:
    """Why nothing answered on the default route."""
    canaries = seen.asked(Probe.DEFAULT)
    if not canaries and (seen.refused_user is not None or seen.link is None or (seen.link.present and seen.link.up)):
        yield _no_canary_sent(seen)
        return
    if seen.link is None:
        yield _no_network(seen, canaries)
        return
    physical = seen.asked(Probe.PHYSICAL)
    if seen.interfaces == ():
        yield Finding(
            Code.ORPHANED_NAMESPACE,
            f"Only the loopback interface is left: {seen.link.name} and all others are gone.",
            {"interface": seen.link.name},
        )
    elif seen.portal:
        yield captive_portal(canaries)
    elif seen.reference_up is False and not seen.contained:
        yield Finding(
            Code.UPLINK_DOWN,
            "Nothing answers, and the site's reference agent has no internet either: the home connection is down.",
            {"reference": "down", **answers(canaries)},
        )
    elif (
        seen.reference_up is None and physical and all(c.answer in (Answer.LOST, Answer.UNREACHABLE) for c in physical)
    ):
        yield Finding(
            Code.UPLINK_DOWN,
            "Nothing answers, neither through the tunnel nor beside it: the home connection may be down, or a firewall "
            "here or at the router drops everything.",
            {"beside_the_tunnel": ", ".join(sorted({c.answer for c in physical})), **answers(canaries)},
        )
    elif not seen.link.present or not seen.link.up:
        yield _tunnel_down(seen.link, answers(canaries))
    elif _is_refused(canaries):
        yield Finding(
            Code.NO_TRAFFIC,
            f"The interface {seen.link.name} is up, and this host refuses what this program sends into it.",
            {"interface": seen.link.name, "refused": "this program's packets", **answers(canaries), **_claimed(seen)},
        )
    elif (gateway := next((c for c in seen.asked(Probe.GATEWAY) if c.answer is Answer.ANSWERED), None)) is not None:
        yield Finding(
            Code.NO_FORWARDING,
            f"The VPN server answers at {gateway.target}, and nothing beyond it does.",
            {"gateway": gateway.target, **answers(canaries), **_claimed(seen)},
        )
    else:
        yield Finding(
            Code.NO_TRAFFIC,
            f"The interface {seen.link.name} is up, but nothing comes back through it.",
            {
                "interface": seen.link.name,
                "sent_bytes": str(seen.link.tx_bytes),
                "received_bytes": str(seen.link.rx_bytes),
                **answers(canaries),
                **_claimed(seen),
            },
        )


def _is_refused(canaries: tuple[Canary, ...]) -> bool:
    """Whether a firewall here let no canary out: then nothing is known of the tunnel."""
    return any(c.answer is Answer.BLOCKED for c in canaries) and all(
        c.answer in (Answer.BLOCKED, Answer.UNREACHABLE) for c in canaries
    )


def _no_network(seen: Observation, canaries: tuple[Canary, ...]) -> Finding:
    """Why nothing answers where no tunnel is known."""
    facts = answers(canaries)
    if seen.interfaces == ():
        message = "Only the loopback interface is here: this network namespace has no way out."
        return Finding(Code.NO_NETWORK, message, facts | {"interfaces": "lo"})
    if any(c.answer is Answer.BLOCKED for c in canaries):
        return Finding(
            Code.NO_NETWORK,
            "This host refuses what this program sends on the default route, and no tunnel is known here: what other "
            "users' programs send may pass.",
            facts | {"refused": "this program's packets"},
        )
    message = (
        "No answer reaches this program on the default route, and no tunnel is known here: whether anything leaves, "
        "and from where, is not known."
    )
    return Finding(Code.NO_NETWORK, message, facts)


def _no_canary_sent(seen: Observation) -> Finding:
    user = seen.refused_user
    if user is not None:
        return Finding(
            Code.NOTHING_SEEN,
            f"The tunnel is for user {user} alone, and the agent is not permitted to ask in that user's place: where "
            "traffic leaves is not known.",
            {"user": str(user)},
        )
    up = "" if seen.link is None else "The tunnel's interface is up, and "
    return Finding(Code.NOTHING_SEEN, f"{up}{'no' if up else 'No'} canary could be sent.")


def tunnel_gone(seen: Observation) -> Iterator[Finding]:
    """The tunnel's interface is down or gone, although something answers and no leak is proven."""
    by_tunnel = any(c.path is Path.TUNNEL and c.answer is Answer.ANSWERED for c in seen.asked(Probe.DEFAULT))
    if seen.link is not None and not (seen.link.present and seen.link.up) and not by_tunnel:
        yield _tunnel_down(seen.link, {})


def round_failed(seen: Observation) -> Finding:
    """The agent runs, but its round failed."""
    message = f"The agent cannot look at its tunnel: {seen.broken}."
    return Finding(Code.NOTHING_SEEN, message, {"reason": seen.broken})


def captive_portal(canaries: tuple[Canary, ...]) -> Finding:
    message = "A page of somebody else's answers on this network, and nothing else does: a captive portal."
    return Finding(Code.CAPTIVE_PORTAL, message, answers(canaries))


def _tunnel_down(link: Link, facts: Mapping[str, str]) -> Finding:
    message = f"The tunnel's interface {link.name} is {'down' if link.present else 'gone'}."
    return Finding(Code.TUNNEL_DOWN, message, {"interface": link.name, **facts})


def answers(canaries: tuple[Canary, ...]) -> dict[str, str]:
    """The answer of each canary, as evidence."""
    return {f"{c.target}_ipv{c.family}": c.answer for c in canaries}


def _claimed(seen: Observation) -> dict[str, str]:
    """What the tunnel's own program says, as evidence in addition to the canaries."""
    facts: dict[str, str] = {}
    for claim in seen.claims:
        if claim.status:
            facts[f"{claim.source}_says"] = claim.status
        if claim.handshake_age is not None:
            facts["handshake_seconds_ago"] = f"{claim.handshake_age:.0f}"
    return facts
