"""A server that has no descriptors left says so, and counts how long."""

import asyncio
import socket

import pytest
import uvloop
from prometheus_client import CollectorRegistry

from tests.conftest import no_descriptor_left
from tests.runtime.test_shortage import SAID
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.server.watch.descriptors import Descriptors


def test_a_server_without_descriptors_says_so_once_and_counts_the_seconds(caplog: pytest.LogCaptureFixture) -> None:
    """On its own loop, which closes each connection as it comes, without a word; and serves the next one after it."""
    registry = CollectorRegistry()
    answers = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async def asked(client: socket.socket, where: tuple[str, int]) -> None:
        client.setblocking(False)
        async with asyncio.timeout(10):
            await asyncio.get_running_loop().sock_connect(client, where)
            answers.append(await asyncio.get_running_loop().sock_recv(client, 16))

    async def main() -> None:
        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        running = asyncio.create_task(Descriptors(SystemClock(), registry).run())
        await asyncio.sleep(0.1)
        with socket.socket() as first, socket.socket() as second:
            with no_descriptor_left():
                await asked(first, server.sockets[0].getsockname())
                await asyncio.sleep(2.5)
            await asked(second, server.sockets[0].getsockname())
        running.cancel()
        server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert answers == [b"", b"hello"]
    assert [r.message for r in caplog.records] == [SAID]
    assert registry.get_sample_value("vpn_sentinel_descriptors_short_seconds_total") in (2.0, 3.0)
