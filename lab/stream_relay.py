"""A tunnel's datagrams inside one TCP connection, as wstunnel, udp2raw and their like carry them.

    python -m lab.stream_relay client UDP-ADDRESS UDP-PORT TCP-ADDRESS TCP-PORT
    python -m lab.stream_relay server TCP-ADDRESS TCP-PORT UDP-ADDRESS UDP-PORT

Each datagram goes behind its length, two bytes in network order. A client connects when the first datagram comes, and
again after the connection broke.
"""

import asyncio
import sys
from collections.abc import Callable


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, take: Callable[[bytes, tuple[str, int]], None]) -> None:
        self._take = take
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._take(data, addr)


def _put(writer: asyncio.StreamWriter, data: bytes) -> None:
    # A full buffer loses datagrams, as a full queue on the line does.
    if writer.transport.get_write_buffer_size() < 1 << 20:
        writer.write(len(data).to_bytes(2, "big") + data)


async def _pour(reader: asyncio.StreamReader, take: Callable[[bytes], None]) -> None:
    """Datagrams out of a stream until it ends."""
    try:
        while True:
            size = int.from_bytes(await reader.readexactly(2), "big")
            take(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, OSError):
        return


async def client(listen: tuple[str, int], server: tuple[str, int]) -> None:
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[bytes] = asyncio.Queue(64)
    peer: tuple[str, int] | None = None

    def take(data: bytes, sender: tuple[str, int]) -> None:
        nonlocal peer
        peer = sender
        if not waiting.full():
            waiting.put_nowait(data)

    transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(take), local_addr=listen)

    def give(data: bytes) -> None:
        if peer is not None:
            transport.sendto(data, peer)

    while True:
        first = await waiting.get()
        try:
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection(*server)
        except (OSError, TimeoutError):
            await asyncio.sleep(0.2)
            continue
        _put(writer, first)

        async def feed(writer: asyncio.StreamWriter = writer) -> None:
            while True:
                _put(writer, await waiting.get())

        feeding = asyncio.ensure_future(feed())
        await _pour(reader, give)
        feeding.cancel()
        writer.close()


async def server(listen: tuple[str, int], target: tuple[str, int]) -> None:
    loop = asyncio.get_running_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transport, _ = await loop.create_datagram_endpoint(
            lambda: _Datagrams(lambda data, _: _put(writer, data)), remote_addr=target
        )
        await _pour(reader, transport.sendto)
        transport.close()
        writer.close()

    await (await asyncio.start_server(serve, *listen)).serve_forever()


if __name__ == "__main__":
    role, near, near_port, far, far_port = sys.argv[1:]
    asyncio.run({"client": client, "server": server}[role]((near, int(near_port)), (far, int(far_port))))
