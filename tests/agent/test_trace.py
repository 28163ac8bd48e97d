from ipaddress import ip_address

import pytest

from tests.agent.doubles import http, reply
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.probes.trace import trace, whoami
from vpn_sentinel.domain.observation import Answer, Path

CLIENT = Client(names=HostResolver())
HERE = ip_address("203.0.113.4")


async def test_both_say_where_we_come_from() -> None:
    def answer(request: str) -> bytes:
        return reply("ip=203.0.113.4\nloc=NL\n") if "/cdn-cgi/trace" in request else reply('{"ip":"203.0.113.4"}')

    async with http(answer) as (port, _):
        base = f"http://127.0.0.1:{port}"
        one, other = await trace(CLIENT, base, Path.TUNNEL), await whoami(CLIENT, base, Path.TUNNEL)
    assert [(c.target, c.answer, c.address, c.family) for c in (one, other)] == [
        ("trace", Answer.ANSWERED, HERE, 4),
        ("server", Answer.ANSWERED, HERE, 4),
    ]


@pytest.mark.parametrize(
    "body", ["<html>Please log in</html>", "[]", '{"ip":5}', '{"ip":"x"}', "", "ip=\n", "[" * 50_000]
)
async def test_a_captive_portals_page_is_no_answer(body: str) -> None:
    async with http(lambda _: reply(body)) as (port, _):
        base = f"http://127.0.0.1:{port}"
        for seen in (await trace(CLIENT, base, Path.TUNNEL), await whoami(CLIENT, base, Path.TUNNEL)):
            assert (seen.answer, seen.address) == (Answer.LOST, None)


@pytest.mark.parametrize("ip", ["192.168.77.2", "10.8.0.2", "0.0.0.0", "100.64.0.1", "fd00::2"])
async def test_an_address_that_the_internet_cannot_see_is_no_exit(ip: str) -> None:
    def answer(request: str) -> bytes:
        return reply(f"ip={ip}\n" if "/cdn-cgi/trace" in request else f'{{"ip":"{ip}"}}')

    async with http(answer) as (port, _):
        base = f"http://127.0.0.1:{port}"
        one, other = await trace(CLIENT, base, Path.TUNNEL), await whoami(CLIENT, base, Path.TUNNEL)
    assert [(c.answer, c.address) for c in (one, other)] == [(Answer.LOST, None), (Answer.UNKNOWN, None)]


async def test_nobody_there_is_lost(free_port: int) -> None:
    assert (await trace(CLIENT, f"http://127.0.0.1:{free_port}", Path.UNKNOWN)).answer is Answer.LOST
