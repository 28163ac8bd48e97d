import asyncio
import socket
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.agent.doubles import ETH, LO, WG, FakeKernel, Loopback, http, reply, udp, waited
from tests.agent.test_dns import whoami
from tests.agent.test_dnswire import answer
from tests.agent.test_place import IPINFO
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.interfaces import Paths, Survey, survey
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.net.rtnetlink import Route
from vpn_sentinel.agent.probes import placing
from vpn_sentinel.agent.probes.canary import CanaryPlan, OverTcp
from vpn_sentinel.agent.probes.dns import Nameserver, system_nameservers
from vpn_sentinel.agent.probes.origin import Origins
from vpn_sentinel.agent.probes.place import Places
from vpn_sentinel.agent.probes.placing import Service
from vpn_sentinel.agent.probes.system_resolver import SystemResolver
from vpn_sentinel.agent.rounds.round import RoundDeps, observe
from vpn_sentinel.domain.judge import judge, with_learned_home
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Place, Probe, Quality, Trigger
from vpn_sentinel.domain.observation import Path as DomainPath
from vpn_sentinel.domain.policy import IPAddress, Policy
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.parsers import networks

HERE = ip_address("127.0.0.1")
EXIT = b"185.65.134.10"
# The tunnel is there and no physical interface beside it, so no canary leaves this machine.
TUNNEL = Survey(interfaces=(LO, WG), tunnel="wg0")


def deps(canary: int, nameserver: int = 9, places: Places | None = None, kernel: FakeKernel | None = None) -> RoundDeps:
    clock = SystemClock()
    return RoundDeps(
        kernel=kernel or FakeKernel(),
        survey=lambda: TUNNEL,
        plan=lambda _: CanaryPlan(targets=(Loopback("a", canary),), reserve=()),
        places=places or Places(Client(names=HostResolver()), (), clock),
        clock=clock,
        nameservers=lambda: (Nameserver(HERE, port=nameserver),),
        no_dns=Nameserver(HERE, port=nameserver),
    )


async def test_a_round_sees_it_all() -> None:
    async with (
        udp(lambda _: EXIT) as (canary, _),
        udp(whoami) as (dns, _),
        http(lambda _: reply(IPINFO)) as (web, _),
    ):
        service = Service("ipinfo.io", f"http://127.0.0.1:{web}", "/json", placing.read_ipinfo)
        places = Places(Client(names=HostResolver()), [service], SystemClock())
        seen = await observe(deps(canary, dns, places), Trigger.TIMER, Policy())
    assert (seen.trigger, seen.exit(4), seen.interfaces) == (Trigger.TIMER, ip_address("185.65.134.10"), ("wg0",))
    assert {str(s.egress) for s in seen.resolvers} == {"185.65.200.7"}
    assert [p.country for p in seen.places] == ["NL"]
    assert seen.dns_intercepted is True  # the address that should run no DNS is the same one here
    assert seen.took_ms > 0


async def test_a_dead_tunnel_is_told_without_asking_further() -> None:
    async with udp(lambda _: None) as (canary, _), udp(whoami) as (dns, served):
        seen = await observe(deps(canary, dns), Trigger.TIMER, Policy())
        assert served.got == []
    assert judge(seen, Policy()).state is State.DOWN
    assert (seen.resolvers, seen.dns_intercepted) == ((), None)


async def test_a_leak_is_told_without_asking_further() -> None:
    policy = Policy(home_networks=networks("185.65.134.10"))
    async with udp(lambda _: EXIT) as (canary, _), udp(whoami) as (dns, served):
        seen = await observe(deps(canary, dns), Trigger.TIMER, policy)
        assert served.got == []
    assert judge(seen, policy).state is State.LEAKING


async def test_what_the_pulses_found_is_told_without_asking_further() -> None:
    async with udp(lambda _: EXIT) as (canary, _), udp(whoami) as (dns, served):
        seen = await observe(replace(deps(canary, dns), is_urgent=lambda: True), Trigger.CANARY, Policy())
        assert served.got == []
    assert seen.exit(4) == ip_address("185.65.134.10")


async def test_pulses_are_asked_when_nameservers_have_answered() -> None:
    class Pulses:
        """Every question to a nameserver loses one."""

        def canary(self, paths: Paths) -> Canary | None:
            return None

        def silent_for(self) -> float:
            return 0.0

        def works(self) -> bool | None:
            return True

        def quality(self, link: Link | None) -> Quality | None:
            return Quality(seconds=60.0, sent=60, lost=min(60, len(served.got)))

    async with udp(lambda _: EXIT) as (canary, _), udp(whoami) as (dns, served):
        seen = await observe(replace(deps(canary, dns), pulses=Pulses()), Trigger.TIMER, Policy())
    assert seen.quality is not None
    assert seen.quality.lost == min(60, len(served.got)) > 0


async def test_a_dns_leak_does_not_wait_for_places() -> None:
    policy = Policy(home_networks=networks("185.65.200.7"))
    release = asyncio.Event()

    async def hang(url: str, **_: object) -> None:
        await release.wait()

    class Hanging(Client):
        get = staticmethod(hang)  # type: ignore[assignment]

    service = Service("ipinfo.io", "http://127.0.0.1", "/json", placing.read_ipinfo)
    places = Places(Hanging(names=HostResolver()), [service], SystemClock())
    async with udp(lambda _: EXIT) as (canary, _), udp(whoami) as (dns, _):
        quiet = replace(deps(canary, dns, places), no_dns=Nameserver(HERE, port=canary))
        async with asyncio.timeout(2):
            seen = await observe(quiet, Trigger.TIMER, policy)
    assert judge(seen, policy).state is State.LEAKING
    assert places.due(ip_address("185.65.134.10"))  # a gathering that was cut short is made up for


async def test_a_dns_leak_does_not_wait_for_the_systems_resolver() -> None:
    """getaddrinfo may take seconds, and nothing that it says makes a leak less of one."""
    asked = asyncio.Event()

    class Slow(SystemResolver):
        async def ask(self, *_: object) -> None:
            asked.set()
            await asyncio.Event().wait()

    policy = Policy(home_networks=networks("185.65.200.7"))
    async with udp(lambda _: EXIT) as (canary, _), udp(whoami) as (dns, _):
        slow = replace(deps(canary, dns), system=Slow(boottime=SystemClock().boottime))
        async with asyncio.timeout(8):
            seen = await observe(slow, Trigger.TIMER, policy)
    assert judge(seen, policy).state is State.LEAKING
    assert asked.is_set()
    assert seen.dns_intercepted is True  # what was known by then is kept


def test_a_dns_leak_waits_for_no_nameserver_that_stays_silent() -> None:
    policy = Policy(home_networks=networks("185.65.200.7"))

    async def round_() -> Observation:
        async with (
            udp(lambda _: EXIT) as (canary, _),
            udp(whoami) as (leaks, _),
            udp(lambda _: None, host="127.0.0.2") as (dead, _),
        ):
            both = (Nameserver(HERE, port=leaks), Nameserver(ip_address("127.0.0.2"), port=dead))
            return await observe(replace(deps(canary, dead), nameservers=lambda: both), Trigger.TIMER, policy)

    seen, seconds = waited(round_())
    assert judge(seen, policy).state is State.LEAKING
    assert seconds < 0.2


@pytest.mark.parametrize(("asn", "state"), [(39351, State.PROTECTED), (3320, State.LEAKING)], ids=["VPN's", "ISP's"])
def test_a_router_that_may_have_a_vpn_of_its_own_leaks_only_once_its_network_is_known(
    namespace: None, asn: int, state: State
) -> None:
    router = ip_address("192.168.1.1")
    subprocess.run(["ip", "address", "add", f"{router}/32", "dev", "lo"], check=True)
    policy = Policy(home_networks=networks("91.10.10.20"))
    around = Survey(interfaces=(LO, ETH, WG), tunnel="wg0", beside=(ETH,))

    async def services(address: IPAddress, _: Callable[[str], Awaitable[bool]]) -> Place | None:
        numbers = {"185.65.134.0": 39351, "185.65.200.0": asn, "91.10.10.0": 3320}
        return Place(ip=address, source="a service", asn=numbers[str(address)])

    async def round_() -> Observation:
        origins = Origins(SystemClock(), services=services, path_to=lambda *_: DomainPath.OUTSIDE)
        async with udp(lambda _: EXIT) as (canary, _), udp(whoami, host=str(router)) as (port, _):
            kernel = FakeKernel(routes={str(router): Route(interface=ETH.index)})
            looks = deps(canary, canary, kernel=kernel)
            looks = replace(looks, survey=lambda: around, nameservers=lambda: (Nameserver(router, port=port),))
            return await observe(replace(looks, origins=origins), Trigger.TIMER, policy)

    seen, _ = waited(round_())
    assert {s.path for s in seen.resolvers} == {DomainPath.OUTSIDE}
    assert judge(seen, policy).state is state


async def test_what_was_found_out_about_a_proxy_beside_a_leak_is_kept() -> None:
    policy = Policy(home_networks=networks("185.65.200.7"))
    async with udp(lambda _: EXIT) as (canary, _), udp(whoami) as (dns, _), udp(answer) as (proxy, _):
        seen = await observe(replace(deps(canary, dns), no_dns=Nameserver(HERE, port=proxy)), Trigger.TIMER, policy)
    assert judge(seen, policy).state is State.LEAKING


async def test_a_nameserver_that_programs_were_seen_to_ask_is_asked_too_and_its_egress_tells() -> None:
    policy = Policy(home_networks=networks("185.65.200.7"))
    async with (
        udp(lambda _: EXIT) as (canary, _),
        udp(lambda q: answer(q, flags=0x8185)) as (dns, _),
        udp(whoami, host="127.0.0.2") as (other, _),
    ):
        there = Nameserver(ip_address("127.0.0.2"), port=other)
        quiet = replace(deps(canary, dns), no_dns=Nameserver(HERE, port=canary))
        alone = await observe(quiet, Trigger.TIMER, policy)
        beside = await observe(replace(quiet, neighbors=lambda: (there,)), Trigger.LEAK, policy)
    assert judge(alone, policy).state is State.PROTECTED
    assert {str(s.egress) for s in beside.resolvers if s.nameserver == there.address} == {"185.65.200.7"}
    assert judge(beside, policy).state is State.LEAKING


async def test_what_a_packet_went_to_and_does_not_answer_is_no_nameserver() -> None:
    there = Nameserver(ip_address("127.0.0.3"), port=9)
    async with udp(lambda _: EXIT) as (canary, _), udp(whoami) as (dns, _):
        seen = await observe(replace(deps(canary, dns), neighbors=lambda: (there,)), Trigger.LEAK, Policy())
    assert {str(s.nameserver) for s in seen.resolvers} == {"127.0.0.1"}


def test_the_survey_is_what_the_kernel_says() -> None:
    assert survey(FakeKernel(links=(LO, ETH, WG), routes={"1.1.1.1": Route(interface=3)})).tunnel == "wg0"


async def test_a_resolv_conf_that_cannot_be_read_here_is_no_dns_that_is_down(tmp_path: Path) -> None:
    def fails(_name: str) -> tuple[IPAddress, ...]:
        raise socket.gaierror(socket.EAI_AGAIN, "the C library cannot read the file either")

    unreadable = tmp_path / "resolv.conf"
    unreadable.symlink_to(unreadable)  # ELOOP; a test that runs as root may read any file
    async with udp(lambda _: b"203.0.113.4") as (port, _):
        looks = replace(
            deps(port),
            nameservers=lambda: system_nameservers(unreadable),
            system=SystemResolver(fails, boottime=SystemClock().boottime),
        )
        seen = await observe(looks, Trigger.TIMER, Policy())
    assert seen.resolvers == ()
    assert "dns_down" not in {f.code.value for f in judge(seen, Policy()).findings}


async def test_a_round_in_which_dns_is_intercepted_asks_another_kind_of_echo_for_the_exit() -> None:
    asked: list[str] = []

    async def trace() -> Canary:
        asked.append("trace")
        at = ip_address(EXIT.decode())
        return Canary(
            probe=Probe.DEFAULT, target="trace", family=4, answer=Answer.ANSWERED, path=DomainPath.TUNNEL, address=at
        )

    async with udp(lambda _: b"91.10.0.54") as (port, _), udp(whoami) as (nameserver, _), udp(answer) as (proxy, _):
        plan = CanaryPlan(
            targets=(Loopback("cloudflare", port),), reserve=(), others=(OverTcp(ask=trace, address=None, port=443),)
        )
        looks = replace(deps(port, nameserver), plan=lambda _: plan)
        intercepted = await observe(replace(looks, no_dns=Nameserver(HERE, port=proxy)), Trigger.TIMER, Policy())
        times = len(asked)
        usual = await observe(replace(looks, no_dns=Nameserver(HERE, port=9)), Trigger.TIMER, Policy())
    assert (str(intercepted.exit(4)), times) == ("185.65.134.10", 1)
    assert (str(usual.exit(4)), len(asked)) == ("91.10.0.54", 1)


async def test_home_as_this_round_saw_it_is_placed_and_compared() -> None:
    """A stub here asks the provider's resolver beside the tunnel, and nobody declared where home is."""
    home = Canary(
        probe=Probe.PHYSICAL, target="echo", family=4, answer=Answer.ANSWERED, path=DomainPath.OUTSIDE,
        address=ip_address("185.65.201.20"),
    )  # fmt: skip

    async def beside() -> Canary:
        return home

    asked: list[str] = []

    async def services(address: IPAddress, may_ask: Callable[[str], Awaitable[bool]]) -> Place | None:
        asked.append(str(address))
        return Place(ip=address, source="a service", asn={"185.65.134.0": 39351}.get(str(address), 3320))

    clock = SystemClock()
    origins = Origins(clock, services=services, path_to=lambda *_: DomainPath.OUTSIDE)
    async with udp(lambda _: EXIT) as (port, _), udp(whoami) as (nameserver, _):
        plan = CanaryPlan(targets=(Loopback("a", port),), reserve=(), also=(beside,))
        looks = replace(deps(port, nameserver), plan=lambda _: plan, origins=origins)
        seen = await observe(looks, Trigger.TIMER, Policy())
    assert sorted(asked) == ["185.65.134.0", "185.65.200.0", "185.65.201.0"]
    found = judge(seen, with_learned_home(seen, Policy()))
    assert found.state is State.LEAKING
    assert any("in the home provider's network AS3320" in f.message for f in found.findings)
