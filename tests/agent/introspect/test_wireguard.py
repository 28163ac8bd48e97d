"""A userspace device is a UNIX socket of the test's; the program `wg` is the real one."""

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.agent.doubles import unix
from vpn_sentinel.agent.introspect.wireguard import Device, DeviceError, Peer, read_device, read_shown
from vpn_sentinel.agent.net.endpoints import Endpoint
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.wire import codec, limits

PRIVATE = "e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a"
SHARED = "188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5dacce3b70fcf52"
ANSWER = f"""private_key={PRIVATE}
listen_port=12912
fwmark=51820
public_key=b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33
preshared_key={SHARED}
protocol_version=1
endpoint=185.65.134.2:51820
last_handshake_time_sec=1800000000
last_handshake_time_nsec=5
tx_bytes=38333
rx_bytes=2224
persistent_keepalive_interval=25
allowed_ip=0.0.0.0/0
public_key=58402e695ba1772b1cc9309755f043251ea77fdcf10fbe63989ceb7e19321376
preshared_key={SHARED}
endpoint=[2a03:1b20:3::2]:51821
last_handshake_time_sec=0
tx_bytes=0
rx_bytes=0
errno=0

"""


def at(text: str) -> IPAddress:
    return codec.address(text)


@asynccontextmanager
async def device(
    folder: Path, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> AsyncIterator[list[bytes]]:
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\n\n"))
        await talk(reader, writer)

    async with unix(folder / "wg0.sock", answer):
        yield asked


def saying(text: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text.encode())
        await reader.read()  # kept open, as wireguard-go does

    return talk


async def test_a_userspace_device_tells_peers_and_mark(tmp_path: Path) -> None:
    async with device(tmp_path, saying(ANSWER)) as asked:
        found = await read_device("wg0", kernel=False, folders=[str(tmp_path / "none"), str(tmp_path)])
    assert asked == [b"get=1\n\n"]
    assert found == Device(
        51820,
        (
            Peer(Endpoint(at("185.65.134.2"), 51820), 1_800_000_000, 2224, 38333),
            Peer(Endpoint(at("2a03:1b20:3::2"), 51821)),
        ),
    )
    assert PRIVATE not in repr(found)
    assert SHARED not in repr(found)


async def test_no_socket_is_no_device(tmp_path: Path) -> None:
    assert await read_device("wg0", kernel=False, folders=[str(tmp_path)]) is None


@pytest.mark.skipif(shutil.which("wg") is None, reason="the program wg is not installed")
async def test_wg_that_finds_no_such_device_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="wg cannot show it"):
        await read_device("wg-none", kernel=True, folders=[str(tmp_path)])


BROKEN = {
    "nothing": "",
    "half an answer": ANSWER[:60],
    "a key without end": "private_key=" + "a" * 100_000,
    "a line without end": "x" * 100_000,
    "too many peers": ANSWER.replace("errno=0\n\n", "") * 2000,
    "an error": "errno=2\n\n",
    "no number": ANSWER.replace("=1800000000", "=soon"),
    "no time": ANSWER.replace("=1800000000", "=" + "9" * 4000),
    "a time before all": ANSWER.replace("=1800000000", "=-" + "9" * 4000),
    "no mark": ANSWER.replace("=51820\n", "=-5\n"),
    "an error without end": "errno=" + "9" * 4000 + "\n\n",
    "no ASCII": "endpoint=\x80\n\n",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_answer_is_an_error_without_its_words(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text.encode())
        await writer.drain()

    caplog.set_level(logging.DEBUG)
    async with device(tmp_path, talk):
        with pytest.raises(DeviceError) as caught:
            await read_device("wg0", kernel=False, folders=[str(tmp_path)])
    told = f"{caught.value!r} {caplog.text}"
    assert len(told) < limits.MAX_TEXT_LENGTH
    assert PRIVATE[:8] not in told
    assert "aaaa" not in told


async def test_a_silent_device_costs_half_a_second(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with device(tmp_path, talk), asyncio.timeout(3):
        with pytest.raises(DeviceError, match="no answer in time"):
            await read_device("wg0", kernel=False, folders=[str(tmp_path)])


async def test_a_socket_that_was_left_behind_is_an_error(tmp_path: Path) -> None:
    async with device(tmp_path, saying("")):
        pass
    left = (tmp_path / "wg0.sock").exists()  # since Python 3.13 the server removes its own
    if left:
        with pytest.raises(DeviceError):
            await read_device("wg0", kernel=False, folders=[str(tmp_path)])
    else:
        assert await read_device("wg0", kernel=False, folders=[str(tmp_path)]) is None


AGES = {
    "an hour ago": (1_800_000_000, 4000.0),
    "never": (0, None),
    "in the future, by a wrong clock": (1_800_009_000, None),
}


@pytest.mark.parametrize(("handshake", "age"), AGES.values(), ids=AGES.keys())
def test_ages_of_handshakes(handshake: int, age: float | None) -> None:
    claim = Device(0, (Peer(Endpoint(at("185.65.134.2"), 51820), handshake),)).claim(1_800_004_000.0)
    assert (claim.source, claim.status, claim.endpoint, claim.handshake_age) == (
        "wireguard", "", "185.65.134.2:51820/udp", age,
    )  # fmt: skip


def test_without_a_peer_there_is_little_to_claim() -> None:
    claim = Device().claim(1.0)
    assert (claim.endpoint, claim.handshake_age) == (None, None)


def test_what_wg_shows_is_read() -> None:
    said = {
        "endpoints": "KEYA=\t185.65.134.2:51820\nKEYB=\t(none)\n",
        "latest-handshakes": "KEYA=\t1800000000\nKEYB=\t0\n",
        "transfer": "KEYA=\t2224\t38333\nKEYB=\t0\t0\n",
        "fwmark": "0xca6c\n",
    }
    found = read_shown(said)
    assert found == Device(51820, (Peer(Endpoint(at("185.65.134.2"), 51820), 1_800_000_000, 2224, 38333), Peer()))
    assert read_shown({**said, "fwmark": "off\n"}).fwmark == 0
    with pytest.raises(ValueError, match="columns"):
        read_shown({**said, "transfer": "KEYA=\n"})
