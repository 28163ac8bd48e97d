from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from tests.agent.doubles import ETH, LO, WG, FakeKernel, Loopback, udp
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.link import IFF_LOWER_UP, Interface
from vpn_sentinel.agent.net.rtnetlink import Route
from vpn_sentinel.agent.probes.canary import CanaryPlan, canaries, one
from vpn_sentinel.agent.probes.gateway import Gateway, gateway
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import Answer, Observation, Path, Probe, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State

HERE = ip_address("127.0.0.1")
LAN = Route(interface=2)
SUBNET = replace(WG, networks=(ip_network("10.66.0.0/24"),))
POINT = replace(WG, networks=(ip_network("10.66.0.2/32"),))


def chosen(tunnel: Interface, *nameservers: str, **routes: Route | None) -> str | None:
    found = {"192.168.1.1": LAN, "10.66.0.2": Route(interface=1, type=2), **routes}
    paths = Paths(FakeKernel(routes=found), Survey(interfaces=(LO, ETH, tunnel), tunnel="wg0"))
    target = gateway(paths, (ip_address(n) for n in nameservers))
    return None if target is None else target.name


VIA = {"1.1.1.1": Route(interface=3, gateway=True, next_hop=ip_address("10.66.0.9"))}
CHOICES = {
    "the VPN's nameserver": (chosen(SUBNET, "192.168.1.1", "1.1.1.1", "10.64.0.1"), "10.64.0.1"),
    "one of carrier-grade NAT": (chosen(POINT, "100.64.0.7"), "100.64.0.7"),
    "the route's gateway": (chosen(SUBNET, "1.1.1.1", **VIA), "10.66.0.9"),
    "the first of the subnet": (chosen(SUBNET, "192.168.1.1"), "10.66.0.1"),
    "nobody is known": (chosen(POINT, "192.168.1.1", "8.8.8.8"), None),
    "it is this host": (chosen(replace(SUBNET, addresses=(ip_address("10.66.0.1"),))), None),
    "the interface is down": (chosen(replace(SUBNET, flags=WG.flags & ~IFF_LOWER_UP)), None),
}


@pytest.mark.parametrize(("found", "expected"), CHOICES.values(), ids=CHOICES.keys())
def test_who_is_asked(found: str | None, expected: str | None) -> None:
    assert found == expected


def test_without_netlink_nobody_is_asked() -> None:
    assert gateway(Paths(None, Survey(tunnel="wg0")), [ip_address("10.64.0.1")]) is None


async def test_any_answer_tells_that_it_lives() -> None:
    async with udp(lambda _: b"?") as (port, served):
        found = await one(Gateway(HERE, port), Path.TUNNEL, Probe.GATEWAY)
    assert (found.answer, found.target, found.address) == (Answer.ANSWERED, "127.0.0.1", None)
    assert b"id\x06server" in served.got[0]


async def test_no_such_port_said_by_the_host_itself_is_an_answer(free_port: int) -> None:
    found = await one(Gateway(HERE, free_port), Path.TUNNEL, Probe.GATEWAY)
    assert found.answer is Answer.ANSWERED
    assert (await one(Gateway(HERE, free_port), Path.TUNNEL)).answer is Answer.UNREACHABLE


async def test_it_is_asked_when_nothing_answers_and_proves_nothing_of_the_internet() -> None:
    async with udp(lambda _: None) as (dead, _), udp(lambda _: b"?") as (alive, served):
        targets = (Loopback("a", dead),)
        paths = Paths(None, Survey(interfaces=(LO,), tunnel="lo"))
        seen = await canaries(CanaryPlan(targets=targets, reserve=(), gateway=Gateway(HERE, alive)), paths)
        assert served.got
    found = next(c for c in seen if c.probe is Probe.GATEWAY)
    assert (found.answer, found.path) == (Answer.ANSWERED, Path.TUNNEL)
    up = Survey(interfaces=(WG,), tunnel="wg0")
    verdict = judge(Observation(trigger=Trigger.TIMER, link=up.link(), interfaces=("wg0",), canaries=seen), Policy())
    assert (verdict.state, [f.code for f in verdict.findings]) == (State.DOWN, ["no_forwarding"])


async def test_it_is_left_alone_while_anything_answers() -> None:
    async with udp(lambda _: b"203.0.113.1") as (port, _), udp(lambda _: b"?") as (alive, served):
        plan = CanaryPlan(targets=(Loopback("a", port),), reserve=(), gateway=Gateway(HERE, alive))
        await canaries(plan, Paths(None, Survey()))
        assert served.got == []
