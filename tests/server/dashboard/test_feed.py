"""Frames for many browsers, each made once, none lost."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.conftest import ManualClock, until
from vpn_sentinel.server.dashboard.feed import Feed
from vpn_sentinel.server.live.hub import Hub


class Renderer:
    """Remembers what it was asked for; `fault` makes the next rendering fail, `gate` holds it up."""

    def __init__(self) -> None:
        self.asked: list[set[str] | None] = []
        self.fault: Exception | None = None
        self.gate: asyncio.Event | None = None

    async def __call__(self, names: set[str] | None) -> bytes:
        self.asked.append(names)
        if self.gate:
            await self.gate.wait()
        if self.fault:
            fault, self.fault = self.fault, None
            raise fault
        return b"all" if names is None else ",".join(sorted(names)).encode()


@pytest.fixture
def renderer() -> Renderer:
    return Renderer()


@pytest.fixture
def feed(hub: Hub, clock: ManualClock, renderer: Renderer) -> Feed:
    return Feed(hub, clock, renderer, idle=b"idle")


async def collect(frames: AsyncIterator[bytes], into: list[bytes]) -> None:
    async for frame in frames:
        into.append(frame)  # noqa: PERF401 - a comprehension would lose what came before a failure


async def test_everybody_gets_everything_and_it_is_rendered_once(hub: Hub, feed: Feed, renderer: Renderer) -> None:
    got: list[list[bytes]] = [[] for _ in range(50)]
    async with asyncio.TaskGroup() as group:
        for into in got:
            group.create_task(collect(await feed.open(), into))
        await until(lambda: all(into == [b"all"] for into in got))
        hub.publish({"a"})
        await until(lambda: all(into == [b"all", b"a"] for into in got))
        hub.publish({"b"})
        hub.publish({"c"})
        await until(lambda: all(into == [b"all", b"a", b"b,c"] for into in got))
        hub.close()
    assert renderer.asked == [None, {"a"}, {"b", "c"}]


async def test_a_browser_that_leaves_in_its_turn_takes_nothing_along(hub: Hub, feed: Feed, renderer: Renderer) -> None:
    first: list[bytes] = []
    second: list[bytes] = []
    async with asyncio.TaskGroup() as group:
        leaver = group.create_task(collect(await feed.open(), first))
        await until(lambda: first == [b"all"])
        group.create_task(collect(await feed.open(), second))
        await until(lambda: second == [b"all"])
        leaver.cancel()  # while it waits for changes on behalf of both
        hub.publish({"a"})
        await until(lambda: second == [b"all", b"a"])
        hub.close()


async def test_a_browser_that_leaves_while_it_renders_leaves_the_rest_to_the_next(
    hub: Hub, feed: Feed, renderer: Renderer
) -> None:
    first: list[bytes] = []
    second: list[bytes] = []
    async with asyncio.TaskGroup() as group:
        leaver = group.create_task(collect(await feed.open(), first))
        await until(lambda: first == [b"all"])
        group.create_task(collect(await feed.open(), second))
        renderer.gate = asyncio.Event()
        hub.publish({"a"})
        await until(lambda: renderer.asked[-1] == {"a"})
        leaver.cancel()
        renderer.gate.set()
        await until(lambda: second == [b"all", b"a"])
        hub.close()
    assert first == [b"all"]


async def test_a_failure_ends_streams_and_loses_no_change(hub: Hub, feed: Feed, renderer: Renderer) -> None:
    frames = await feed.open()
    assert await anext(frames) == b"all"
    renderer.fault = RuntimeError("database away")
    hub.publish({"a"})
    with pytest.raises(RuntimeError):
        await anext(frames)
    again = await feed.open()
    assert [await anext(again), await anext(again)] == [b"all", b"a"]


async def test_a_browser_that_is_far_behind_gets_the_whole_again(hub: Hub, feed: Feed, clock: ManualClock) -> None:
    slow, quick = await feed.open(), await feed.open()
    assert [await anext(slow), await anext(quick)] == [b"all", b"all"]
    hub.publish({"a"})
    assert [await anext(quick), await anext(slow)] == [b"a", b"a"]
    for n in range(45):
        feed._frames.append((feed._number + 1, str(n).encode()))  # as after 11 s of storm
        feed._number += 1
    clock.now += 11
    assert await anext(slow) == b"all"
    assert await anext(quick) == b"all"


async def test_many_that_come_back_at_once_cost_one_reading(
    hub: Hub, feed: Feed, renderer: Renderer, clock: ManualClock
) -> None:
    for _ in range(100):
        await anext(await feed.open())
    assert renderer.asked == [None]
    clock.now += 5
    await anext(await feed.open())
    assert renderer.asked == [None, None]


async def test_what_changed_between_the_whole_and_the_stream_is_sent(hub: Hub, feed: Feed) -> None:
    frames = await feed.open()
    hub.publish({"a"})
    assert [await anext(frames), await anext(frames)] == [b"all", b"a"]


async def test_closing_ends_every_stream_at_once(hub: Hub, feed: Feed) -> None:
    got: list[bytes] = []
    async with asyncio.timeout(1), asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(collect(await feed.open(), got))
        await until(lambda: len(got) == 20)
        hub.close()
