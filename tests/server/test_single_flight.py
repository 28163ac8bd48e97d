import asyncio

import pytest

from tests.conftest import until
from vpn_sentinel.server.single_flight import SingleFlight


class Renderer:
    """Makes pages by number, each when it is let."""

    def __init__(self) -> None:
        self.made = self.at_once = self.most = 0
        self.let = asyncio.Event()
        self.fails = False

    async def __call__(self) -> str:
        self.made += 1
        number = self.made
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await self.let.wait()
        self.at_once -= 1
        if self.fails:
            raise OSError("away")
        return f"page {number}"


async def test_many_who_ask_at_once_share_what_was_begun_after_they_asked() -> None:
    renderer = Renderer()
    shared = SingleFlight(renderer)
    first = [asyncio.create_task(shared.get()) for _ in range(3)]
    await until(lambda: renderer.made)
    later = [asyncio.create_task(shared.get()) for _ in range(50)]
    await asyncio.sleep(0)
    renderer.let.set()
    assert set(await asyncio.gather(*first)) == {"page 1"}
    assert set(await asyncio.gather(*later)) == {"page 2"}
    assert (renderer.made, renderer.most) == (2, 1)
    assert await shared.get() == "page 3"


async def test_a_page_that_fails_is_tried_anew_by_the_next() -> None:
    renderer = Renderer()
    shared = SingleFlight(renderer)
    renderer.let.set()
    renderer.fails = True
    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            await shared.get()
    renderer.fails = False
    assert await shared.get() == "page 3"


async def test_who_goes_while_it_is_made_leaves_it_to_the_next() -> None:
    renderer = Renderer()
    shared = SingleFlight(renderer)
    gone = asyncio.create_task(shared.get())
    await until(lambda: renderer.made)
    waits = asyncio.create_task(shared.get())
    gone.cancel()
    renderer.let.set()
    assert await waits == "page 2"


async def test_hundreds_who_wait_have_it_in_one_turn() -> None:
    renderer = Renderer()
    shared = SingleFlight(renderer)
    waiting = [asyncio.create_task(shared.get()) for _ in range(300)]
    await until(lambda: renderer.made)
    renderer.let.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert all(task.done() for task in waiting)
