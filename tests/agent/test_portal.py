import asyncio
from ipaddress import ip_address

import pytest

from tests.agent.doubles import ETH, LO, WG, http, reply, tcp
from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.agent.probes.canary import CanaryPlan
from vpn_sentinel.agent.probes.portal import portal
from vpn_sentinel.agent.rounds.side_probes import SideProbes
from vpn_sentinel.domain.observation import Answer, Canary, Claim, Observation, Path, Probe, Trigger

HERE = ip_address("127.0.0.1")
TRACE = "fl=1\nh=1.1.1.1\nip=91.10.10.20\nts=1\n"

ANSWERS = {
    "the service": (reply(TRACE), False),
    "the service, which moves to HTTPS": (reply("", 301, Location="https://1.1.1.1/cdn-cgi/trace"), False),
    "a login page elsewhere": (reply("", 302, Location="http://login.hotspot.test/"), True),
    "a login page in place of the answer": (reply("<html>Welcome</html>"), True),
    "network authentication required": (reply("<html>", 511), True),
    "a move to itself": (reply("", 302, Location="/login"), None),
    "a move to nowhere": (reply("", 302, Location="http:///"), None),
    "an error": (reply("", 503), None),
    "no HTTP": (b"hello\r\n\r\n", None),
    "nothing": (b"", None),
    "too much": (reply(b"x" * 200_000), None),
}


@pytest.mark.parametrize(("raw", "expected"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_who_answers(raw: bytes, expected: bool | None) -> None:
    async with http(lambda _: raw) as (port, got):
        assert await portal(HERE, "1.1.1.1", "lo", port=port) is expected
    assert got[0].startswith("GET /cdn-cgi/trace HTTP/1.1\r\nHost: 1.1.1.1\r\n")


async def test_nobody_is_no_portal(free_port: int) -> None:
    assert await portal(HERE, "1.1.1.1", "lo", port=free_port) is None
    assert await portal(HERE, "1.1.1.1", "none0", port=free_port) is None

    async def hang(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()
        await reader.read()

    async with tcp(hang) as port:
        assert await portal(HERE, "1.1.1.1", "lo", port=port, limit=0.1) is None


def canary(probe: Probe, answer: Answer) -> Canary:
    return Canary(probe=probe, target="cloudflare", family=4, answer=answer, path=Path.UNKNOWN)


ASKED = {
    "a packet beside the tunnel was refused": ([Answer.BLOCKED], False),
    "one of two was": ([Answer.ANSWERED, Answer.BLOCKED], False),
    "it could not be sent": ([Answer.UNKNOWN], False),
    "it got lost": ([Answer.LOST], True),
    "it came back, since DNS passes": ([Answer.ANSWERED], True),
    "it is on its way": ([], True),
}


@pytest.mark.parametrize(("beside", "asks"), ASKED.values(), ids=ASKED.keys())
async def test_a_portal_is_looked_for_only_without_a_kill_switch(beside: list[Answer], asks: bool) -> None:
    devices = []

    async def look(device: str) -> bool:
        devices.append(device)
        return True

    lost = canary(Probe.DEFAULT, Answer.LOST)
    seen = Observation(trigger=Trigger.TIMER, canaries=(lost,))
    async with asyncio.TaskGroup() as group:
        probing = SideProbes(portal=look).begin(
            group, Survey(interfaces=(LO, ETH, WG), tunnel="wg0", uplinks=(ETH,), beside=(ETH,))
        )
        probing.silence((lost, *(canary(Probe.PHYSICAL, a) for a in beside)))
        found = await probing.add(seen, hurry=False)
    assert (found.portal, devices) == ((True, ["eth0"]) if asks else (None, []))


async def test_claims_that_come_late_are_left_out() -> None:
    claim = Claim(source="gluetun", status="running")
    late = asyncio.Event()

    async def ready(_: Survey) -> tuple[Claim, ...]:
        return (claim,)

    async def slow(_: Survey) -> tuple[Claim, ...]:
        await late.wait()
        return (claim,)

    seen = Observation(trigger=Trigger.TIMER)
    for claims, expected in ((ready, (claim,)), (slow, ())):
        async with asyncio.timeout(2), asyncio.TaskGroup() as group:
            probing = SideProbes(claims=claims, forwarded_port=lambda: 45678).begin(group, Survey())
            probing.with_suspects(CanaryPlan())
            found = await probing.add(seen, hurry=False)
        assert (found.claims, found.forwarded_port, found.portal, found.flaky) == (expected, 45678, None, ())
