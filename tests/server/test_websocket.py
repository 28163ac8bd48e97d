"""What one agent may cost by its frames: a real WebSocket on loopback, whose client sends what it likes."""

import asyncio
import gc
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tests.conftest import until
from tests.server.test_serving import House, house
from vpn_sentinel.server.request_stream import RequestStream
from vpn_sentinel.server.websocket import FRAME_BURST, FrameMeter

SHAKE = (
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
CONTINUATION, TEXT, CLOSE, PING = 0, 1, 8, 9
FIN = 0x80


def frame(opcode: int, payload: bytes = b"", fin: int = FIN) -> bytes:
    """RFC 6455, section 5.2, with a mask of zeros."""
    if len(payload) < 126:
        size = bytes([0x80 | len(payload)])
    elif len(payload) < 65_536:
        size = b"\xfe" + struct.pack("!H", len(payload))
    else:
        size = b"\xff" + struct.pack("!Q", len(payload))
    return bytes([fin | opcode]) + size + bytes(4) + payload


async def connected(at: House) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await at.connect()
    writer.write(SHAKE)
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def last_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The opcode and payload of the last one before the end; servers' frames have no mask."""
    last = (-1, b"")
    async with asyncio.timeout(10):
        while True:
            try:
                head = await reader.readexactly(2)
                last = head[0] & 0xF, await reader.readexactly(head[1])
            except (asyncio.IncompleteReadError, ConnectionError):
                return last


FLOODS = {
    "empty continuations": (frame(TEXT, b"{", fin=0), frame(CONTINUATION, fin=0)),
    "empty messages": (b"", frame(TEXT)),
    "pings": (b"", frame(PING)),
}


@pytest.mark.parametrize(("first", "each"), FLOODS.values(), ids=FLOODS.keys())
async def test_who_sends_frames_without_end_is_refused(first: bytes, each: bytes) -> None:
    async with house() as at:
        reader, writer = await connected(at)
        writer.write(first + each * 10_000)
        opcode, said = await last_frame(reader)
        assert (opcode, said) == (CLOSE, struct.pack("!H", 1008) + b"too many frames")
        await until(lambda: not at.server.connection_limit.open)


async def test_a_text_that_is_none_and_its_close_together_are_no_fault_of_ours() -> None:
    faults = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    async with house() as at:
        _, writer = await connected(at)
        writer.write(frame(TEXT, b"\xff") + frame(CLOSE))
        await until(lambda: not at.server.connection_limit.open)
    assert faults == []


async def test_a_websocket_keeps_nothing_of_the_request_that_it_began_as() -> None:
    async with house() as at:
        gc.collect()
        gc.disable()
        try:
            await connected(at)
            left = [o for o in gc.get_objects() if isinstance(o, (HttpToolsProtocol, RequestStream))]
        finally:
            gc.enable()
        assert not left


async def test_a_message_in_many_frames_is_taken() -> None:
    async with house() as at:
        reader, writer = await connected(at)
        pieces = int(FRAME_BURST) - 20
        writer.write(frame(TEXT, b"x", fin=0) + frame(CONTINUATION, b"y" * 200, fin=0) * pieces + frame(CONTINUATION))
        head = await reader.readexactly(10)
        assert (head[0], head[1]) == (FIN | TEXT, 127)
        assert struct.unpack("!Q", head[2:])[0] == 1 + 200 * pieces


async def test_who_takes_no_answers_is_not_read_and_is_cut() -> None:
    async with house(drained_within=0.5) as at:
        reader, writer = await connected(at)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        sent = 0
        message = frame(TEXT, b"x" * 60_000)
        while at.server.connection_limit.open and sent < 400 * len(message):
            writer.write(message)
            sent += len(message)
            try:
                async with asyncio.timeout(2):
                    await writer.drain()
            except (ConnectionError, TimeoutError):
                break
        await until(lambda: not at.server.connection_limit.open)
        assert sent < 20_000_000  # what the two kernels' buffers hold


async def test_who_does_not_take_the_farewell_holds_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with house(drained_within=0.3) as at:
        reader, writer = await connected(at)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        connection = next(iter(at.server.server_state.connections))
        held = os.urandom(16_000_000)
        connection.transport.write(held)  # more than the kernels take
        writer.write(frame(TEXT, b"\xff"))  # no UTF-8: it is closed for that
        await until(lambda: not at.server.connection_limit.open)


@settings(deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 5, 125, 126, 300, 65_535, 65_536, 70_000]), max_size=6),
    cuts=st.lists(st.integers(1, 20) | st.integers(1, 80_000), max_size=40),
)
def test_frames_are_counted_however_they_are_cut(sizes: list[int], cuts: list[int]) -> None:
    """As many as the meter grants, and not one more, whatever lies between two reads."""
    sent = b"".join(frame(TEXT, b"\xff" * size) for size in sizes) + frame(PING) * (int(FRAME_BURST) - len(sizes))
    meter = FrameMeter(0.0)
    for size in [*cuts, len(sent)]:
        assert meter.allows(sent[:size], 0.0)
        sent = sent[size:]
    assert not meter.allows(frame(PING), 0.0)
    assert meter.allows(frame(PING), 1.0)
