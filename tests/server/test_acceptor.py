import asyncio
import contextlib
import socket
from collections.abc import Callable

import pytest
import uvloop

from tests.conftest import needs_files
from vpn_sentinel.server.acceptor import Acceptor
from vpn_sentinel.server.connection_limit import ConnectionLimit, ConnectionSlot

CAME = 300


class Served(asyncio.Protocol):
    def __init__(self, slot: ConnectionSlot) -> None:
        self.slot = slot

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.slot.cut = transport.close

    def connection_lost(self, exc: Exception | None) -> None:
        self.slot.release()


@needs_files(2 * CAME + 100)
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio's", "uvloop's"])
def test_who_comes_behind_hundreds_is_taken_within_a_few_turns(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Under load a turn takes long, and the kernel lets only so many wait."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(_hundreds())


async def _hundreds() -> None:
    limit = ConnectionLimit(CAME, CAME, CAME)
    with contextlib.ExitStack() as open_:
        bound = open_.enter_context(socket.socket())
        bound.bind(("127.0.0.1", 0))
        bound.setblocking(False)
        acceptor = Acceptor(bound, limit, Served, backlog=CAME)
        for _ in range(CAME):
            open_.enter_context(socket.create_connection(bound.getsockname(), timeout=5.0))
        for _ in range(CAME // 8 + 10):
            await asyncio.sleep(0)
        assert len(limit) == CAME
        for slot in limit.unserved():
            slot.cut()
        acceptor.close()
        await acceptor.wait_closed()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(limit) == 0


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio's", "uvloop's"])
@pytest.mark.parametrize("turns", range(5))
def test_who_has_to_go_before_it_is_open_goes(loop: Callable[[], asyncio.AbstractEventLoop], turns: int) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        for by_its_place in (True, False):
            runner.run(_has_to_go(turns, by_its_place=by_its_place))


async def _has_to_go(turns: int, *, by_its_place: bool) -> None:
    limit, lost = ConnectionLimit(1, 1, 1), asyncio.Event()

    class Ends(Served):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            lost.set()

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.setblocking(False)
        acceptor = Acceptor(bound, limit, Ends, backlog=1)
        with socket.create_connection(bound.getsockname(), timeout=5.0) as caller:
            await _comes(limit)
            for _ in range(turns):
                await asyncio.sleep(0)
            if by_its_place or not acceptor._opening:
                limit.unserved()[0].cut()
            acceptor.close()
            await acceptor.wait_closed()
            async with asyncio.timeout(5.0):
                await lost.wait()
            assert len(limit) == 0
            assert not acceptor.is_serving()
            assert caller.recv(1) == b""


async def _comes(limit: ConnectionLimit) -> None:
    """Until it is counted, and not a turn longer."""
    async with asyncio.timeout(5.0):
        while not len(limit):  # noqa: ASYNC110 - a turn is what matters here
            await asyncio.sleep(0)
