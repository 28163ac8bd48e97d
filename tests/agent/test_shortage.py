"""A host that has run out of descriptors asks nothing, and so knows nothing: no dead tunnel, no DNS that is down."""

from ipaddress import ip_address
from pathlib import Path

from tests.agent.doubles import ETH, WG, FakeKernel, http, reply, udp
from tests.conftest import no_descriptor_left
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.net.urls import address_in
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.agent.probes.canary import CanaryPlan, OverTcp, canaries
from vpn_sentinel.agent.probes.system_resolver import SystemResolver
from vpn_sentinel.agent.probes.targets import EchoAnswer
from vpn_sentinel.agent.probes.trace import trace
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import Answer, Link, Observation, Trigger
from vpn_sentinel.domain.observation import Path as Way
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.runtime.clock import SystemClock

HERE = ip_address("127.0.0.1")


class Whoami:
    """A canary target on the loopback, which names the address that it is asked from."""

    def __init__(self, name: str, port: int) -> None:
        self.name, self.address, self.port = name, HERE, port

    def question(self) -> tuple[bytes, object]:
        return b"?", lambda data: EchoAnswer(address_in(data.decode()))


async def test_a_tunnel_that_could_not_be_looked_at_is_not_down() -> None:
    paths = Paths(FakeKernel(), Survey(interfaces=(ETH, WG), tunnel="wg0", uplinks=(ETH,), beside=(ETH,)))
    link = Link(name="wg0", present=True, up=True)
    async with udp(lambda _: b"203.0.113.4") as (port, _), http(lambda _: reply("ip=203.0.113.4\n")) as (web, _):
        client = Client(names=HostResolver())
        plan = CanaryPlan(
            targets=(Whoami("echo", port),),  # type: ignore[arg-type]
            reserve=(),
            others=(OverTcp(ask=lambda: trace(client, f"http://127.0.0.1:{web}", Way.TUNNEL), address=HERE, port=web),),
        )
        with no_descriptor_left():
            found = await canaries(plan, paths)
        again = await canaries(plan, paths)
    seen = Observation(trigger=Trigger.TIMER, link=link, interfaces=("eth0", "wg0"), canaries=found)
    assert {c.answer for c in found} == {Answer.UNKNOWN}
    assert judge(seen, Policy()).state is State.UNKNOWN
    assert any(c.answer is Answer.ANSWERED for c in again)


async def test_names_that_nobody_could_ask_for_are_not_dns_that_is_down(tmp_path: Path) -> None:
    system = SystemResolver(boottime=SystemClock().boottime, nsswitch=tmp_path / "none", patience=20)
    paths = Paths(FakeKernel(), Survey(interfaces=(ETH, WG), tunnel="wg0", beside=(ETH,)))
    link = Link(name="wg0", present=True, up=True)
    servers = (dns.Nameserver(HERE, 53),)
    with no_descriptor_left():
        asked = await dns.resolvers(paths, servers)
        used = await system.ask(None, servers)
    seen = Observation(trigger=Trigger.TIMER, link=link, resolvers=asked.sightings, system_lookup=used)
    assert used is not None
    assert used.answer is Answer.UNKNOWN
    assert not {f.code.value for f in judge(seen, Policy()).findings} & {"dns_down", "dns_leak"}
