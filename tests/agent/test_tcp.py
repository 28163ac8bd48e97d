"""Whether connections come about where datagrams do not, in namespaces with real rules."""

import asyncio
from dataclasses import replace
from ipaddress import ip_address

import pytest

from tests.agent.doubles import ETH, LO, FakeKernel, refuse, tcp
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.probes import tcp as probe
from vpn_sentinel.domain.observation import Answer, Canary, Path, Probe

HERE = ip_address("127.0.0.1")


async def _take(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_a_port_that_takes_connections_and_one_that_does_not(free_port: int) -> None:
    async with tcp(_take) as port:
        assert await probe.opens(HERE, port)
        assert await probe.opens(HERE, port, device="lo")
    assert not await probe.opens(HERE, free_port)
    assert not await probe.opens(HERE, free_port, device="none0")


@pytest.mark.parametrize(
    ("rule", "open_"),
    [
        ("meta l4proto udp drop", True),
        ("meta l4proto tcp drop", False),
        ("meta l4proto tcp reject with tcp reset", False),
    ],
)
def test_a_rule_is_felt_that_refuses_one_protocol(namespace: None, rule: str, *, open_: bool) -> None:
    refuse(rule)

    async def ask() -> bool:
        async with tcp(_take) as port:
            return await probe.opens(HERE, port)

    assert asyncio.run(ask()) is open_


async def test_only_ways_out_that_no_datagram_took_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    async def opens(address: object, port: int, *, device: str | None = None) -> bool:
        asked.append((str(address), device))
        return True

    monkeypatch.setattr(probe, "opens", opens)
    other = replace(ETH, index=4, name="eth1")
    survey = Survey(interfaces=(LO, ETH, other), tunnel="wg0", uplinks=(ETH, other))
    shown = Canary(
        probe=Probe.PHYSICAL, target="cloudflare", family=4, answer=Answer.ANSWERED, path=Path.OUTSIDE, interface="eth0"
    )
    paths = Paths(FakeKernel(gateways={2, 4}), survey)
    found = await probe.beside(paths, (shown,), max_uplinks=2)
    assert sorted(asked) == [("1.1.1.1", "eth1"), ("2606:4700:4700::1111", "eth0"), ("2606:4700:4700::1111", "eth1")]
    assert {(c.interface, c.family, c.answer) for c in found} == {
        ("eth1", 4, Answer.ANSWERED), ("eth0", 6, Answer.ANSWERED), ("eth1", 6, Answer.ANSWERED),
    }  # fmt: skip
