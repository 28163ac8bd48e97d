"""A tunnel without an interface here: on the router, on another host, or nowhere."""

from collections.abc import Iterator

from vpn_sentinel.domain.observation import Answer, Observation, Probe
from vpn_sentinel.domain.origins import asns_of, home_asns, same_block
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy, is_public
from vpn_sentinel.domain.verdict import Code, Finding


def findings(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """What is not known without a tunnel interface, and what the known home networks show instead.

    A home address may have changed since it was declared, so that traffic from home leaves from another address: one in
    home's own network proves nothing. Traffic that comes out at a home address leaks, which `leaks` finds.
    """
    if seen.link is not None:
        yield from _no_difference(seen, policy)
        yield from _declared_alone(seen, policy)
        return
    exits = _exits(seen)
    if not _comparable(exits, policy):
        yield _unknown(exits, policy)
        return
    away = [e for e in exits if not policy.is_home(e)]
    near = next((e for e in away if _shared(e, seen, policy)), None)
    if near is not None:
        yield Finding(
            Code.TUNNEL_UNKNOWN,
            f"Traffic leaves from {near}, in the home network's own {_shared(near, seen, policy)}: by a VPN, or from a "
            "home address that has changed. No tunnel interface is in sight to tell.",
            {"exit": str(near), "home": ", ".join(map(str, policy.home_networks))},
        )
    elif away and seen.interfaces is not None and not all(_elsewhere(e, seen, policy) for e in away):
        named = ", ".join(map(str, away))
        yield Finding(
            Code.TUNNEL_UNSEEN,
            f"No tunnel interface is in sight: that {named} is not a home address rests on what is declared.",
            {"exit": named, "home": ", ".join(map(str, policy.home_networks))},
        )


def _no_difference(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """Packets sent outside the tunnel come out at the same address as the traffic that should go through it."""
    for family in (4, 6):
        answered = [c for c in seen.canaries if c.family == family and c.answer is Answer.ANSWERED]
        through = {c.address for c in answered if c.probe is Probe.DEFAULT and c.address is not None}
        beside = {c.address for c in seen.came_out_beside() if c.family == family}
        for same in through & beside if through <= beside else ():
            if not policy.is_home(same):
                yield Finding(
                    Code.TUNNEL_UNKNOWN,
                    f"All traffic comes out at {same}, and so does a packet that was sent beside the tunnel: whether "
                    "anything goes through it is not known.",
                    {"exit": str(same), "beside": str(same)},
                )


def _declared_alone(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """Only a setting says that the device is a tunnel: the finding that protection rests on that.

    None where packets outside it come out elsewhere, or where the exit's network is not home's.
    """
    exits = _exits(seen)
    if seen.link is None or not seen.link.declared or not exits or any(policy.is_home(e) for e in exits):
        return
    beside = {c.address for c in seen.came_out_beside()}
    if beside.difference(exits) or all(_elsewhere(e, seen, policy) for e in exits):
        return
    named = ", ".join(map(str, exits))
    besides = f" That {named} is no home address rests on what is declared." if _comparable(exits, policy) else ""
    yield Finding(
        Code.TUNNEL_UNSEEN,
        f"{seen.link.name} is taken for a VPN's only because VPN_SENTINEL_TUNNEL_INTERFACE says so; nothing here shows "
        f"that it is one, nor that traffic from {named} goes through a VPN.{besides}",
        {"interface": seen.link.name, "exit": named},
    )


def rests_on_home(seen: Observation, policy: Policy) -> bool:
    """Whether only the home networks distinguish protected traffic from other traffic."""
    exits = _exits(seen)
    return seen.link is None and _comparable(exits, policy) and not any(policy.is_home(e) for e in exits)


def _exits(seen: Observation) -> list[IPAddress]:
    """Where traffic comes out; private addresses, as a captive portal may return one, do not count."""
    answered = [e for e in (seen.exit(4), seen.exit(6)) if e and is_public(e)]
    return answered or ([seen.reported_from] if seen.reported_from and is_public(seen.reported_from) else [])


def _comparable(exits: list[IPAddress], policy: Policy) -> bool:
    """Whether a public home network of their IP version is known."""
    return any(e.version == home.version for e in exits for home in policy.home_networks if _is_seen(home))


def _is_seen(home: IPNetwork) -> bool:
    return is_public(home.network_address) or is_public(home.broadcast_address)


def _shared(exit_: IPAddress, seen: Observation, policy: Policy) -> str:
    """What an exit shares with a home network: its block or its AS; "" when nothing is known."""
    if any(same_block(exit_, home.network_address) for home in policy.home_networks):
        return f"block of addresses (/{24 if exit_.version == 4 else 48})"
    number = min(asns_of(exit_, seen) & home_asns(seen, policy), default=None)
    return f"AS{number}" if number else ""


def _elsewhere(exit_: IPAddress, seen: Observation, policy: Policy) -> bool:
    return bool(asns_of(exit_, seen) and home_asns(seen, policy))


def _unknown(exits: list[IPAddress], policy: Policy) -> Finding:
    named, declared = ", ".join(map(str, exits)), ", ".join(map(str, policy.home_networks))
    return Finding(
        Code.TUNNEL_UNKNOWN,
        f"Traffic leaves from {named}, and nothing here tells whether that is a VPN."
        if named
        else "Answers come, and none tells the address that traffic leaves from: nothing here shows a VPN.",
        ({"exit": named} if named else {}) | ({"declared": declared} if declared else {}),
    )
