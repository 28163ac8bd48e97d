"""Targets whose input are the answers of services, and of the programs on this machine."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from bench.fuzz.target import ENDS, Loop, Target, Try, Wire, check, parts
from vpn_sentinel.agent.doctor.context import _date
from vpn_sentinel.agent.introspect.device import counters
from vpn_sentinel.agent.introspect.gluetun import Gluetun, Login
from vpn_sentinel.agent.introspect.openvpn import OpenVpn, RefusedError
from vpn_sentinel.agent.introspect.wireguard import DeviceError, _lines, read_answer, read_shown
from vpn_sentinel.agent.net import http, urls
from vpn_sentinel.agent.net.endpoints import parse_endpoint
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.probes import placing, trace
from vpn_sentinel.agent.remedies.failure import RemedyError
from vpn_sentinel.agent.remedies.qbittorrent import QBittorrent
from vpn_sentinel.agent.remedies.transmission import Transmission
from vpn_sentinel.agent.uplink import answers, websocket
from vpn_sentinel.agent.uplink.channel import ChannelError
from vpn_sentinel.domain.observation import Path
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.server.notify.channel import DeliveryError
from vpn_sentinel.server.notify.channels.bot_api import BotApi
from vpn_sentinel.server.notify.failures import retry_after
from vpn_sentinel.server.own_address import OwnAddress
from vpn_sentinel.server.settings import TelegramSettings
from vpn_sentinel.wire import limits

# What `Client` turns into an HttpError, and the handshake of a WebSocket into a ChannelError.
_BROKEN_OFF = (OSError, ValueError, EOFError, asyncio.LimitOverrunError)


def read(data: bytes, limit: int = 16 * 1024) -> asyncio.StreamReader:
    """What a connection brings before it ends."""
    reader = asyncio.StreamReader(limit)
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def http_answers() -> Try:
    """What stands behind a request."""
    loop = Loop()

    async def one(data: bytes) -> None:
        try:
            found = await http.read_response(read(data))
        except _BROKEN_OFF as e:
            check(len(http.reason(e)) <= 200, "a reason that repeats what was sent at length")
            return
        check(len(found.body) <= http.MAX_BODY_BYTES and len(found.headers) <= 100, "an answer that is too large")
        with contextlib.suppress(ValueError):
            check(
                len(answers.decompressed(found.headers, found.body)) <= http.MAX_BODY_BYTES,
                "an answer that unpacks to too much",
            )
        answers.own_refusal(found.status, found.headers, found.body)
        date = found.headers.get("date")
        for told in (_date(date), retry_after(date, 1_800_000_000.0)):
            check(told is None or math.isfinite(told), "a time that is none")

    return lambda data: loop(one(data))


def websocket_answers() -> Try:
    """Frames of the server; where the first byte is odd, the handshake's answer instead."""
    loop = Loop()
    where, key = urls.split("http://198.51.100.1/api/v1/agent"), Secret("key")

    async def one(data: bytes) -> None:
        reader = read(data[1:])
        protocol = asyncio.StreamReaderProtocol(reader)
        wire = Wire(protocol)
        writer = asyncio.StreamWriter(wire, protocol, reader, loop.loop)
        with contextlib.suppress(ChannelError), contextlib.closing(writer):
            if (data[:1] or b"\0")[0] & 1:
                await websocket._shake_hands(where, key, reader, writer)
                raise AssertionError("a handshake that nobody can have answered")
            socket = websocket.WebSocket(reader, writer)
            with contextlib.suppress(ChannelError):
                while True:
                    check(len(await socket.receive()) <= limits.MAX_BODY_BYTES, "a message that is too large")
            check(len(wire.written) <= 2 * len(data) + 64, "more is written than was read")
            await socket.close()

    return lambda data: loop(one(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Served(http.Client):
    """A client whose answers, status and body, are given."""

    given: list[bytes]

    async def _exchange(self, *_: Any, **__: Any) -> http.Response:
        try:
            return await http.read_response(read(self.given.pop(0) if self.given else b""))
        except _BROKEN_OFF as e:
            raise http.HttpError(http.reason(e)) from e


def served(data: bytes) -> Served:
    return Served(names=HostResolver(), given=[b"HTTP/1.1 " + part for part in parts(data, 4)])


def gluetun() -> Try:
    """Four answers of its control server, each from its status on."""
    loop = Loop()

    async def one(data: bytes) -> None:
        asked = Gluetun(served(data), "http://127.0.0.1:8000", Login(), lambda: None)
        for _ in range(2):
            await asked.look()
            claim = asked.claim()
            check(claim is None or (claim.status or "").isprintable(), "a status that cannot be shown")
            check(asked.port is None or 0 < asked.port < 2**16, "a port that there is not")

    return lambda data: loop(one(data))


def torrent_clients() -> Try:
    """Four answers of Transmission's, and of qBittorrent's, each from its status on."""
    loop = Loop()

    async def one(data: bytes) -> None:
        for client in (
            Transmission(served(data), "http://127.0.0.1:9091", "", Secret("")),
            QBittorrent(served(data), "http://127.0.0.1:8080", "", Secret("")),
        ):
            with contextlib.suppress(RemedyError):
                check(all(isinstance(name, str) for name in await client.pause()), "what is no name of a torrent")

    return lambda data: loop(one(data))


def openvpn() -> Try:
    """All that the management interface says; where it begins with `p`, a password is known."""
    loop = Loop()

    class Telling(OpenVpn):
        given = b""

        async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader = read(self.given, 4096)
            protocol = asyncio.StreamReaderProtocol(reader)
            return reader, asyncio.StreamWriter(Wire(protocol), protocol, reader, loop.loop)

    async def one(data: bytes) -> None:
        asked = Telling("127.0.0.1:1", Secret("password" if data[:1] == b"p" else ""), lambda: None)
        asked.given = data[1:]
        with contextlib.suppress(OSError, EOFError, ValueError, RefusedError, TimeoutError):
            await asked._session()
        if (claim := asked.claim()) is not None:
            check(claim.status and claim.status.isascii(), "a state that cannot be shown")

    return lambda data: loop(one(data))


def wireguard() -> Try:
    """A userspace device's answer, or, in four parts, what wg(8) shows."""
    loop = Loop()

    async def given(data: bytes) -> AsyncIterator[bytes]:
        async for line in _lines(read(data, 4096)):
            yield line

    async def one(data: bytes) -> None:
        with contextlib.suppress(ValueError, EOFError, DeviceError):
            (await read_answer(given(data))).claim(1_800_000_000.0)
        words = ("endpoints", "latest-handshakes", "transfer", "fwmark")
        with contextlib.suppress(ValueError):
            said = {word: part.decode("ascii") for word, part in zip(words, parts(data, 4), strict=True)}
            read_shown(said).claim(1_800_000_000.0)
        text = data.decode("utf-8", "replace")
        with contextlib.suppress(ValueError):
            found = parse_endpoint(text)
            check(parse_endpoint(str(found)) == found, "an endpoint that does not come back")

    return lambda data: loop(one(data))


def devices() -> Try:
    """/proc/net/dev."""

    def one(data: bytes) -> None:
        counters(data, "tun0")

    return one


def places() -> Try:
    """An answer of a geolocation service, or of who tells where we come from."""
    known = placing.services("", "", "", "")

    def one(data: bytes) -> None:
        for service in known:
            with contextlib.suppress(placing.BadAnswerError):
                found = service.read(data)
                for text in (found.region, found.city, found.timezone, found.org):
                    check(
                        text is None or (text.isprintable() and len(text) <= limits.MAX_TEXT_LENGTH),
                        "a text to hide in",
                    )
        for target in ("trace", "server"):
            trace._address(target, data)

    return one


def traces() -> Try:
    """The server's own look at where it comes from, and the agent's."""
    loop = Loop()

    async def one(data: bytes) -> None:
        answer = httpx.MockTransport(lambda _: httpx.Response(200, stream=_Stream(data)))
        async with httpx.AsyncClient(transport=answer) as client:
            with contextlib.suppress(httpx.HTTPError, TimeoutError, ValueError):
                await OwnAddress(client, "http://198.51.100.1")._ask()
        await trace.whoami(served(data), "http://198.51.100.1", Path.TUNNEL)

    return lambda data: loop(one(data))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._data


def bot_api() -> Try:
    """Telegram's answer: its status in two bytes, one that says how it is packed, and its body."""
    loop = Loop()
    settings = TelegramSettings(token=Secret("1:token"), chat_id="1", api_url="http://198.51.100.1")
    packed: Mapping[int, dict[str, str]] = {1: {"content-encoding": "gzip"}, 2: {"content-encoding": "deflate"}}
    data = b""

    def answer(_: httpx.Request) -> httpx.Response:
        status = 100 + int.from_bytes(data[:2]) % 500
        return httpx.Response(status, headers=packed.get((data[2:3] or b"\0")[0], {}), stream=_Stream(data[3:]))

    async def quick(_: float) -> None:
        pass

    async def one(given: bytes) -> None:
        nonlocal data
        data = given
        api = BotApi(http_client, settings, SystemClock(), sleep=quick)
        with contextlib.suppress(DeliveryError):
            await api.get_me()
        with contextlib.suppress(DeliveryError):
            for update in await api.get_updates(None, 0):
                check(isinstance(update.update_id, int), "an update without a number")
        with contextlib.suppress(DeliveryError):
            await api.send_message("1", "text", html=False)

    http_client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    ENDS.callback(lambda: loop(http_client.aclose()))
    return lambda given: loop(one(given))


TARGETS = {
    "http_answers": Target(
        modules=("agent.net.http", "agent.uplink.answers", "agent.doctor.context", "wire.problem"), make=http_answers
    ),
    "websocket_answers": Target(modules=("agent.uplink.websocket",), make=websocket_answers),
    "gluetun": Target(modules=("agent.introspect.gluetun",), make=gluetun),
    "torrent_clients": Target(
        modules=("agent.remedies.transmission", "agent.remedies.qbittorrent"), make=torrent_clients
    ),
    "openvpn": Target(modules=("agent.introspect.openvpn",), make=openvpn),
    "wireguard": Target(modules=("agent.introspect.wireguard", "agent.net.endpoints"), make=wireguard),
    "devices": Target(modules=("agent.introspect.device",), make=devices),
    "places": Target(modules=("agent.probes.placing", "agent.probes.trace"), make=places),
    "traces": Target(modules=("server.own_address", "agent.probes.trace"), make=traces),
    "bot_api": Target(modules=("server.notify.channels.bot_api", "server.notify.failures"), make=bot_api),
}
