"""Egresses of which more can be learned, and what is proved without them."""

from ipaddress import ip_address, ip_network

import pytest

from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import (
    Answer,
    Canary,
    Link,
    Observation,
    Path,
    Place,
    Probe,
    ResolverSighting,
    SystemLookup,
    Trigger,
)
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.resolvers import undecided_egresses, without_egresses
from vpn_sentinel.domain.verdict import State

EXIT, EGRESS, HOME = (ip_address(a) for a in ("185.65.134.10", "91.10.0.54", "91.10.10.20"))
POLICY = Policy(home_networks=(ip_network(HOME),))
VPN, ISP = 39351, 3320


def saw(
    nameserver: str = "192.168.1.1", shown: str = "91.10.0.54", *, system: bool = False, **asns: int
) -> Observation:
    """A nameserver that is reached beside the tunnel; `asns` are the known AS numbers of exit, egress and home."""
    addresses = {"exit": EXIT, "egress": EGRESS, "home": HOME}
    sighting = ResolverSighting(
        method="google", nameserver=ip_address(nameserver), answer=Answer.ANSWERED, path=Path.OUTSIDE,
        egress=ip_address(shown),
    )  # fmt: skip
    through = Canary(
        probe=Probe.DEFAULT, target="echo", family=4, answer=Answer.ANSWERED, path=Path.TUNNEL, address=EXIT
    )
    return Observation(
        trigger=Trigger.NETWORK,
        link=Link(name="wg0", present=True, up=True),
        canaries=(through,),
        resolvers=() if system else (sighting,),
        system_lookup=SystemLookup(answer=Answer.ANSWERED, egress=(EGRESS,)) if system else None,
        places=tuple(Place(ip=addresses[name], source="test", asn=number) for name, number in asns.items()),
    )


CASES = {
    # The router may have a VPN of its own, with the same provider.
    "a LAN resolver of which nothing is known": (saw(), [EGRESS], State.PROTECTED),
    "its AS is known, and the exit's is not": (saw(egress=ISP, home=ISP), [EGRESS], State.PROTECTED),
    "the exit's AS is known, and its own is not": (saw(exit=VPN, home=ISP), [EGRESS], State.PROTECTED),
    "both are known to differ": (saw(exit=VPN, egress=ISP), [], State.LEAKING),
    "both are known to be the same": (saw(exit=VPN, egress=VPN, home=ISP), [], State.PROTECTED),
    "a LAN resolver that asks from home": (saw(shown=str(HOME)), [], State.LEAKING),
    "a public one beside the tunnel": (saw(nameserver="91.10.0.53"), [EGRESS], State.LEAKING),
    "a program's lookup": (saw(system=True, egress=ISP, home=ISP), [EGRESS], State.PROTECTED),
    "a program's lookup, all known": (saw(system=True, exit=VPN, egress=ISP, home=ISP), [], State.LEAKING),
}


@pytest.mark.parametrize(("seen", "open_", "proved"), CASES.values(), ids=CASES.keys())
def test_what_is_proved_whatever_can_still_be_learned(seen: Observation, open_: list[object], proved: State) -> None:
    found = undecided_egresses(seen, POLICY)
    assert list(found) == open_
    left = judge(without_egresses(found, seen), POLICY)
    assert (left.state is State.LEAKING) is (proved is State.LEAKING)
    assert proved is State.PROTECTED or judge(seen, POLICY).state is State.LEAKING
