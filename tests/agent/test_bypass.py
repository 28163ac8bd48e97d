"""One packet into each part of the internet that routes send past the tunnel, and how long its answer is waited for."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_network

import pytest

from tests.agent.doubles import refuse, waited
from vpn_sentinel.agent.probes.bypass import BypassProbes
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Probe, Routed, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State

SILENT = "127.93.184.216"
OUTSIDE = Routed(interface="eth0", family=4, share=0.1, networks=(ip_network(SILENT),))
INSIDE = Routed(interface="wg0", family=4, share=0.9)
Enough = Callable[[tuple[Routed, ...]], bool]


@asynccontextmanager
async def nobody_answers() -> AsyncIterator[None]:
    """As where the address is nobody's on the link, or the router says nothing."""
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        asyncio.DatagramProtocol, local_addr=(SILENT, 33434)
    )
    yield
    transport.close()


async def tried(enough: Enough) -> tuple[Routed, ...]:
    async with nobody_answers(), asyncio.TaskGroup() as group:
        return await BypassProbes(group, (INSIDE, OUTSIDE), "wg0").results(enough)


def leaks(*, held: bool) -> Enough:
    """What a round makes of it; `held`: a kill switch refuses what is sent by eth0."""
    beside = Canary(probe=Probe.PHYSICAL, target="echo", family=4, answer=Answer.BLOCKED, interface="eth0")
    link = Link(name="wg0", present=True, up=True)
    seen = Observation(trigger=Trigger.NETWORK, link=link, canaries=(beside,) if held else ())

    def enough(routed: tuple[Routed, ...]) -> bool:
        found = Observation(trigger=seen.trigger, link=seen.link, canaries=seen.canaries, routed=routed)
        return judge(found, Policy()).state is State.LEAKING

    return enough


def test_a_leak_that_routes_prove_waits_for_no_router() -> None:
    (inside, outside), seconds = waited(tried(leaks(held=False)))
    assert (inside, outside.answer) == (INSIDE, Answer.UNKNOWN)
    assert seconds == pytest.approx(0.05)


def test_behind_a_kill_switch_only_an_answer_proves_it() -> None:
    (_, outside), seconds = waited(tried(leaks(held=True)))
    assert (outside.answer, str(outside.asked)) == (Answer.LOST, SILENT)
    assert seconds == pytest.approx(0.6)


def test_a_refusal_of_this_host_is_known_in_time(namespace: None) -> None:
    refuse("udp dport 33434 drop")
    (_, outside), _ = waited(tried(leaks(held=False)))
    assert outside.answer is Answer.BLOCKED


@pytest.mark.parametrize(
    ("network", "tried"),
    [
        ("5.9.10.0/24", "5.9.10.1"),
        ("5.9.10.7/32", "5.9.10.7"),
        ("128.0.0.0/1", "128.0.0.1"),
        ("0.0.0.0/0", "1.1.1.1"),
        ("0.0.0.0/1", "1.1.1.1"),
        ("::/0", "2606:4700:4700::1111"),
        ("2000::/3", "2000::1"),
    ],
)
async def test_what_is_tried_is_an_address_that_a_host_can_have(namespace: None, network: str, tried: str) -> None:
    part = Routed(interface="eth0", family=ip_network(network).version, share=0.1, networks=(ip_network(network),))
    async with asyncio.TaskGroup() as group:
        (told,) = await BypassProbes(group, (part,), "wg0").results(lambda _: False)
    assert str(told.asked) == tried
