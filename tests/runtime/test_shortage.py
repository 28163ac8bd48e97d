"""Descriptors that are used up: one line, whatever is tried, and all goes on when there are some again."""

import asyncio
import socket

import pytest

from tests.conftest import ManualClock, no_descriptor_left
from vpn_sentinel.cli.process import run_until_stopped
from vpn_sentinel.runtime.shortage import AcceptFailures

SAID = "new connections cannot be taken"


def test_asyncios_loop_says_so_in_one_line_and_takes_them_later(caplog: pytest.LogCaptureFixture) -> None:
    """Its own way are as many traces a second as the backlog is long."""
    answers, limits = list[bytes](), list[int]()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async def work(stop: asyncio.Event) -> None:
        server = await asyncio.start_server(greet, "127.0.0.1", 0, backlog=16)
        with socket.socket() as client:
            client.setblocking(False)
            with no_descriptor_left() as limit:
                limits.append(limit)
                await asyncio.get_running_loop().sock_connect(client, server.sockets[0].getsockname())
                await asyncio.sleep(2.5)
            async with asyncio.timeout(10):
                answers.append(await asyncio.get_running_loop().sock_recv(client, 16))
        server.close()

    assert run_until_stopped(work, fast=False) == 0
    assert answers == [b"hello"]
    [said] = caplog.records
    assert (said.message, said.__dict__["reason"]) == (SAID, "Too many open files")
    assert [said.__dict__["open_files_at_most"]] == limits
    assert said.exc_info is None


async def test_what_lasts_is_said_once_a_minute_with_how_often(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    untaken = AcceptFailures(clock.boottime)
    for _ in range(150):
        untaken.note("Too many open files")
        clock.now += 1.0
    assert [r.__dict__["times"] for r in caplog.records] == [1, 60, 60]


async def test_what_else_fails_in_a_loop_is_told_with_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    untaken = AcceptFailures(ManualClock().boottime)
    for context in ({"message": "a task failed", "exception": OSError(24, "")}, {"message": "no error", "socket": 1}):
        untaken.handle(asyncio.get_running_loop(), context)
    assert [r.message.splitlines()[0] for r in caplog.records] == ["a task failed", "no error"]
