"""What the server's memory of a tunnel proves when its agent knows of none, and what it does not."""

from dataclasses import replace
from ipaddress import ip_address

import pytest

from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Place, Probe, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.remembered import MAX_REMEMBERED, Working, learned_working, with_memory
from vpn_sentinel.domain.verdict import Code, State

EXIT, HOME = ip_address("193.32.249.70"), ip_address("83.46.112.77")
UP = Link(name="wg0", present=True, up=True)
WORKING = Working(device="wg0", beside=("eth0",), exits=(EXIT,), asns=(39351,))


def canary(address: str, path: Path = Path.UNKNOWN) -> Canary:
    at = ip_address(address)
    return Canary(probe=Probe.DEFAULT, target="echo", family=at.version, answer=Answer.ANSWERED, path=path, address=at)


def placed(address: str, asn: int) -> Place:
    return Place(ip=ip_address(address), source="a database", asn=asn)


def blind(
    address: str = str(HOME), interfaces: tuple[str, ...] | None = ("eth0",), asn: int | None = None
) -> Observation:
    """An agent that started with an empty folder, and knows of no tunnel."""
    places = () if asn is None else (placed(address, asn),)
    return Observation(trigger=Trigger.TIMER, interfaces=interfaces, canaries=(canary(address),), places=places)


def test_the_same_namespace_without_its_tunnel_at_another_network_leaks() -> None:
    seen = with_memory(blind(), WORKING, (HOME,))
    verdict = judge(seen, Policy())
    assert verdict.state is State.LEAKING
    assert [f.code for f in verdict.findings] == [Code.IP_LEAK]
    assert str(HOME) in verdict.findings[0].message
    assert judge(blind(), Policy()).state is State.UNKNOWN


UNPROVEN = {
    "nothing is remembered": (blind(), None, (HOME,)),
    "the report came by another way": (blind(), WORKING, (ip_address("192.0.2.9"),)),
    "the report came over a LAN": (blind(), WORKING, (ip_address("192.168.1.9"),)),
    "nobody knows where the report came from": (blind(), WORKING, ()),
    "the same exit": (blind(str(EXIT)), WORKING, (EXIT,)),
    "another exit of the same network": (blind("193.32.249.9"), WORKING, (ip_address("193.32.249.9"),)),
    "another server of the same provider": (
        blind("185.65.134.66", asn=39351), WORKING, (ip_address("185.65.134.66"),)
    ),
    "the tunnel is there, and not recognised": (blind(interfaces=("eth0", "wg0")), WORKING, (HOME,)),
    "an interface that was not there may be the new tunnel": (blind(interfaces=("eth0", "tap7")), WORKING, (HOME,)),
    "nobody could list the interfaces": (blind(interfaces=None), WORKING, (HOME,)),
    "no interface at all": (blind(interfaces=()), WORKING, (HOME,)),
    "only the other family was ever seen": (blind("2001:db8:a::1"), WORKING, (ip_address("2001:db8:a::1"),)),
    "a private address": (blind("10.0.0.5"), WORKING, (ip_address("10.0.0.5"),)),
    "no answer": (replace(blind(), canaries=()), WORKING, (HOME,)),
}  # fmt: skip


@pytest.mark.parametrize(("seen", "known", "came_from"), UNPROVEN.values(), ids=UNPROVEN.keys())
def test_what_is_not_proven_stays_unknown(seen: Observation, known: Working | None, came_from: tuple) -> None:  # type: ignore[type-arg]
    assert with_memory(seen, known, came_from) == seen
    assert judge(seen, Policy()).state is State.UNKNOWN


def test_an_agent_that_knows_its_tunnel_is_believed() -> None:
    seen = replace(blind(), link=UP)
    assert with_memory(seen, WORKING, (HOME,)) == seen


def works(address: str, link: Link | None = UP, path: Path = Path.TUNNEL, **more: object) -> Observation:
    return Observation(
        trigger=Trigger.TIMER,
        link=link,
        interfaces=("eth0", "wg0"),
        canaries=(canary(address, path),),
        **more,  # type: ignore[arg-type]
    )


def test_what_works_is_remembered_with_where_it_came_out() -> None:
    known = learned_working(None, works(str(EXIT), places=(placed(str(EXIT), 39351),)))
    assert known == WORKING
    assert learned_working(known, works(str(EXIT))) == known


def test_only_so_many_exits_are_kept_and_none_of_another_device() -> None:
    known: Working | None = None
    for n in range(1, 20):
        known = learned_working(known, works(f"193.32.{n}.7"))
    assert known is not None
    assert len(known.exits) == MAX_REMEMBERED
    assert known.exits[-1] == ip_address("193.32.19.7")
    other = replace(works("146.70.1.2"), link=replace(UP, name="tun0"), interfaces=("eth0", "tun0"))
    assert learned_working(known, other) == Working(device="tun0", beside=("eth0",), exits=(ip_address("146.70.1.2"),))


@pytest.mark.parametrize(
    "seen",
    [
        works(str(HOME), link=None),
        works(str(HOME), link=replace(UP, up=False)),
        works(str(HOME), path=Path.OUTSIDE),
        works("10.0.0.1"),
        replace(works(str(EXIT)), interfaces=None),
        replace(works(str(EXIT)), interfaces=tuple(f"veth{n}" for n in range(200))),
    ],
)
def test_what_does_not_show_a_tunnel_at_work_teaches_nothing(seen: Observation) -> None:
    assert learned_working(WORKING, seen) == WORKING
