"""The server's own address, asked of a service that may say anything."""

import asyncio
from collections.abc import AsyncIterator
from ipaddress import ip_network

import httpx
import pytest

from tests.conftest import until
from vpn_sentinel.server.own_address import OwnAddress


class Endless(httpx.AsyncByteStream):
    def __init__(self) -> None:
        self.sent = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"ip=146.70.1.2\n"
        while True:
            self.sent += 1024
            yield b"x" * 1024


def asking(response: httpx.Response) -> OwnAddress:
    http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: response))
    return OwnAddress(http, "https://trace.test")


async def test_the_address_is_a_network_of_one() -> None:
    own = asking(httpx.Response(200, stream=httpx.ByteStream(b"fl=1\nip=146.70.1.2\nts=1\n")))
    assert own() == ()
    await own._ask()
    assert own() == (ip_network("146.70.1.2/32"),)


async def test_an_answer_without_end_is_not_read_to_its_end() -> None:
    body = Endless()
    own = asking(httpx.Response(200, stream=body))
    with pytest.raises(ValueError, match="more than 4096 bytes"):
        await own._ask()
    assert body.sent <= 5 * 1024
    assert own() == ()


@pytest.mark.parametrize("text", ["", "ip=", "ip=somewhere", "<html>"])
async def test_an_answer_without_an_address_is_none(text: str) -> None:
    own = asking(httpx.Response(200, stream=httpx.ByteStream(text.encode())))
    with pytest.raises(ValueError, match="is no address such as"):
        await own._ask()
    assert own() == ()


@pytest.mark.parametrize("text", ["ip=10.0.0.1", "ip=0.0.0.0", "ip=::1", "ip=::ffff:192.168.1.1"])
async def test_an_address_that_the_internet_cannot_see_is_none(text: str) -> None:
    own = asking(httpx.Response(200, stream=httpx.ByteStream(text.encode())))
    with pytest.raises(ValueError, match="cannot be on the internet"):
        await own._ask()
    assert own() == ()


async def test_a_refusal_is_no_answer() -> None:
    with pytest.raises(httpx.HTTPStatusError):
        await asking(httpx.Response(302, headers={"Location": "http://10.0.0.1/"}, text="ip=1.2.3.4"))._ask()


@pytest.mark.parametrize("wanted", [(), ("old clients cannot be told from home yet: set VPN_SENTINEL_HOME_NETWORKS",)])
async def test_that_nobody_answers_is_said_once_and_by_what_it_means(
    wanted: tuple[str, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("vpn_sentinel.server.own_address._RETRY_S", 0.0)
    asked = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        raise httpx.ConnectError("refused")

    own = OwnAddress(httpx.AsyncClient(transport=httpx.MockTransport(refuse)), "https://trace.test", wanted)
    task = asyncio.create_task(own.run())
    await until(lambda: len(asked) > 3)
    task.cancel()
    assert [r.getMessage() for r in caplog.records if r.name.endswith("own_address")] == list(wanted)
