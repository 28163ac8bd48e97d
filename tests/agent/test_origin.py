"""The AS number of an address: asked once a block, through the tunnel only, and kept."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from tests.agent.doubles import ETH, LO, WG, FakeKernel, Loopback, http, reply, udp, waited
from tests.agent.test_dnswire import answer, text
from tests.conftest import ManualClock
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.net.rtnetlink import Route
from vpn_sentinel.agent.probes.canary import CanaryPlan
from vpn_sentinel.agent.probes.dns import Nameserver
from vpn_sentinel.agent.probes.dnswire import DnsReply
from vpn_sentinel.agent.probes.origin import ORIGIN_FRESH_S, Origins, block, question, read
from vpn_sentinel.agent.probes.place import Places
from vpn_sentinel.agent.probes.placing import Service, read_ipinfo
from vpn_sentinel.agent.rounds.round import RoundDeps, observe
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import Path, Place, Trigger
from vpn_sentinel.domain.policy import IPAddress, Policy
from vpn_sentinel.domain.verdict import Code
from vpn_sentinel.runtime.clock import SystemClock

EGRESS = ip_address("80.58.184.30")
HERE = ip_address("127.0.0.1")
LINKS = (LO, ETH, WG)


def paths(interface: int, owner: str = "wg0") -> Paths:
    """Where 127.0.0.1 is reached by the tunnel, which stands for a nameserver inside it."""
    kernel = FakeKernel(routes={"127.0.0.1": Route(interface=interface)}, default=interface)
    return Paths(kernel, Survey(interfaces=LINKS, tunnel=owner))


def as_routed(server: Nameserver, paths: Paths) -> Path:
    """A socket of this test is on loopback; the path is what the kernel would say of a nameserver elsewhere."""
    return paths.of(server.address, server.port)


class Facts:
    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def fact(self, name: str) -> str | None:
        return self.kept.get(name)

    def keep(self, name: str, value: str) -> None:
        self.kept[name] = value


def test_the_name_holds_the_block_and_never_the_host() -> None:
    assert question(block(EGRESS)) == "184.58.80.origin.asn.cymru.com"
    assert question(block(ip_address("2a02:908:1234::53"))) == "4.3.2.1.8.0.9.0.2.0.a.2.origin6.asn.cymru.com"


ANSWERS = {
    "one": ([("3352 | 80.58.0.0/16 | ES | ripencc | 2001-01-01",)], (3352,)),
    "several origins": ([("3352 64500 | 80.58.0.0/16 | ES | ripencc |",)], (3352, 64500)),
    "the longest prefix": ([("1 | 80.0.0.0/8 | | |",), ("2 | 80.58.0.0/16 | | |",)], (2,)),
    "another block's": ([("1 | 81.0.0.0/8 | | |",)], ()),
    "the other family's": ([("1 | ::/0 | | |",)], ()),
    "junk": ([("hello",), ("| |",), ("x | 80.58.0.0/16",), (f"{'9' * 5000} | 80.58.0.0/16",), ()], ()),
    "nothing": ([], ()),
}


@pytest.mark.parametrize(("texts", "numbers"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer(texts: list[tuple[str, ...]], numbers: tuple[int, ...]) -> None:
    assert read(DnsReply(1, 0, (), tuple(texts)), block(EGRESS)) == numbers


def served(data: bytes) -> bytes:
    return answer(data, text(b"3352 | 80.58.0.0/16 | ES | ripencc | 2001-01-01"))


async def test_it_is_asked_once_and_outlives_the_process(clock: ManualClock) -> None:
    facts = Facts()
    async with udp(served) as (port, there):
        origins = Origins(clock, facts, path_to=as_routed)
        for _ in range(3):
            await origins.learn([EGRESS, ip_address("80.58.184.31")], [Nameserver(HERE, port=port)], paths(WG.index))
        assert [p.asn for p in origins.known([EGRESS])] == [3352]
        again = Origins(clock, facts, path_to=as_routed)
        await again.learn([EGRESS], [Nameserver(HERE, port=port)], paths(WG.index))
        assert [p.asn for p in again.known([EGRESS])] == [3352]
        assert len(there.got) == 1
        clock.now += ORIGIN_FRESH_S
        await again.learn([EGRESS], [Nameserver(HERE, port=port)], paths(WG.index))
        assert len(there.got) == 2


async def test_no_question_leaves_outside_the_tunnel(clock: ManualClock) -> None:
    async with udp(served) as (port, there):
        await Origins(clock, path_to=as_routed).learn([EGRESS], [Nameserver(HERE, port=port)], paths(ETH.index))
        assert there.got == []


async def test_one_that_stays_silent_is_left_alone_for_a_while(clock: ManualClock) -> None:
    async with udp(lambda data: answer(data, flags=0x8183)) as (port, there):
        origins = Origins(clock, path_to=as_routed)
        for _ in range(3):
            await origins.learn([EGRESS], [Nameserver(HERE, port=port)], paths(WG.index))
        assert len(there.got) == 1
        assert origins.known([EGRESS]) == ()


class Counting:
    """A geolocation service that knows networks, and what it was asked."""

    def __init__(self, asn: str = "AS3352 TELEFONICA DE ESPANA", address: str = "80.58.184.0") -> None:
        self.got: list[str] = []
        self._said = {"ip": address, "country": "ES", "org": asn}

    def __call__(self, request: str) -> bytes:
        self.got.append(request.split(" ")[1])
        return reply(json.dumps(self._said))


def refused(data: bytes) -> bytes:
    return answer(data, flags=0x8185)


async def learned(
    clock: ManualClock, service: Counting, interface: int = WG.index, facts: Facts | None = None, times: int = 1
) -> tuple[Place, ...]:
    """What is known of the egress when Team Cymru's zone does not answer."""
    async with udp(refused) as (port, _), http(service) as (web, _):
        known = Service("ipinfo.io", f"http://127.0.0.1:{web}", "/json", read_ipinfo, "/{}/json")
        trace = Service("cloudflare", f"http://127.0.0.1:{web}", "/trace", read_ipinfo)
        places = Places(Client(names=HostResolver()), [trace, known], clock)
        origins = Origins(clock, facts, path_to=as_routed, services=places.about, names=HostResolver())
        for _ in range(times):
            await origins.learn([EGRESS], [Nameserver(HERE, port=port)], paths(interface))
        return origins.known([EGRESS])


async def test_a_geolocation_service_is_the_second_source_and_is_asked_of_the_block_once(clock: ManualClock) -> None:
    service, facts = Counting(), Facts()
    (place,) = await learned(clock, service, facts=facts, times=3)
    assert (place.asn, place.source, place.ip) == (3352, "ipinfo.io", EGRESS)
    assert service.got == ["/80.58.184.0/json"]
    assert await learned(clock, service, facts=facts) == (place,)
    assert len(service.got) == 1
    clock.now += ORIGIN_FRESH_S
    await learned(clock, service, facts=facts)
    assert len(service.got) == 2


async def test_no_service_is_asked_beside_the_tunnel(clock: ManualClock) -> None:
    service = Counting()
    assert await learned(clock, service, ETH.index) == ()
    assert service.got == []


@pytest.mark.parametrize("service", [Counting(asn="3352"), Counting(address="81.0.0.0")], ids=["a name", "another's"])
async def test_what_is_no_number_of_that_block_is_not_kept(clock: ManualClock, service: Counting) -> None:
    assert await learned(clock, service, times=3) == ()
    assert len(service.got) == 1


async def _telefonica(address: IPAddress, may_ask: Callable[[str], Awaitable[bool]]) -> Place | None:
    """A service at a literal address, which is reached as everything is."""
    return Place(ip=address, source="a service", asn=3352) if await may_ask("http://127.0.0.1/") else None


def test_where_dns_keeps_silent_a_service_is_asked_soon(clock: ManualClock) -> None:
    """A leak may be waiting to be told; whoever answers first is believed."""

    async def learn() -> tuple[Place, ...]:
        async with udp(lambda _: None) as (port, _):
            origins = Origins(clock, path_to=as_routed, services=_telefonica)
            await origins.learn([EGRESS], [Nameserver(HERE, port=port)], paths(WG.index))
            return origins.known([EGRESS])

    (place,), seconds = waited(learn())
    assert (place.asn, place.source) == (3352, "a service")
    assert seconds == pytest.approx(0.3)


def test_what_is_known_may_be_enough(clock: ManualClock) -> None:
    home = ip_address("2a02:908:1234::53")

    async def learn() -> tuple[Place, ...]:
        async with udp(lambda data: None if b"origin6" in data else served(data)) as (port, _):
            origins = Origins(clock, path_to=as_routed)
            there, around = [Nameserver(HERE, port=port)], paths(WG.index)
            await origins.learn([home, EGRESS], there, around, enough=lambda: bool(origins.known([EGRESS])))
            return origins.known([EGRESS, home])

    (place,), seconds = waited(learn())
    assert (place.asn, seconds) == (3352, 0.0)


def test_a_service_that_hangs_does_not_hold_up_what_dns_tells_late(clock: ManualClock) -> None:
    async def hangs(*_: object) -> Place | None:
        await asyncio.Event().wait()
        return None

    async def learn() -> tuple[Place, ...]:
        answers = iter([None])  # the first question is lost
        async with udp(lambda data: next(answers, served(data))) as (port, _):
            origins = Origins(clock, path_to=as_routed, services=hangs)
            await origins.learn([EGRESS], [Nameserver(HERE, port=port)], paths(WG.index))
            return origins.known([EGRESS])

    (place,), seconds = waited(learn())
    assert (place.asn, place.source) == (3352, "cymru.com")
    assert seconds == pytest.approx(0.4)


async def test_what_was_kept_before_there_were_two_sources_is_read(clock: ManualClock) -> None:
    facts = Facts()
    facts.kept["origins"] = json.dumps({"80.58.184.0/24": [clock.wall(), [3352]]})
    assert [(p.asn, p.source) for p in Origins(clock, facts).known([EGRESS])] == [(3352, "cymru.com")]


@pytest.mark.parametrize("kept", ["", "[]", "{", '{"a": 1}', '{"a": ["x", []]}', "null"])
def test_damaged_facts_are_no_facts(clock: ManualClock, kept: str) -> None:
    facts = Facts()
    facts.kept["origins"] = kept
    assert Origins(clock, facts).known([EGRESS]) == ()


async def test_a_local_forwarder_in_the_home_providers_network_is_a_leak() -> None:
    """Home is known, its provider's resolver by no database: the two share an AS, and the exit is in another."""
    exit_, home = "185.65.134.10", ip_network("83.46.112.77")

    def resolver(data: bytes) -> bytes:
        for block_, asn in ((b"\x03134\x0265", 39351), (b"\x03184\x0258\x0280", 3352), (b"\x03112\x0246\x0283", 3352)):
            if block_ in data:
                return answer(data, text(f"{asn} | 0.0.0.0/0 | XX | x | x".encode()))
        return answer(data, text(str(EGRESS).encode()))

    async with udp(lambda _: exit_.encode()) as (canary, _), udp(resolver) as (port, _):
        clock = SystemClock()
        deps = RoundDeps(
            kernel=FakeKernel(default=WG.index),
            survey=lambda: Survey(interfaces=(LO, WG), tunnel="wg0"),
            plan=lambda _: CanaryPlan(targets=(Loopback("a", canary),), reserve=()),
            places=Places(Client(names=HostResolver()), (), clock),
            clock=clock,
            nameservers=lambda: (Nameserver(HERE, port=port),),
            no_dns=Nameserver(HERE, port=9),
            origins=Origins(clock, path_to=as_routed),
        )
        policy = Policy(home_networks=(home,))
        (found,) = [
            f for f in judge(await observe(deps, Trigger.TIMER, policy), policy).findings if "dns_leak" in f.code
        ]
        unknown = await observe(replace(deps, origins=None), Trigger.TIMER, policy)
    assert "AS3352" in found.message
    assert Code.RESOLVER_UNEXPECTED in {f.code for f in judge(unknown, policy).findings}
