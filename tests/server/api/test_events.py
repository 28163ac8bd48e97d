"""`/events` through a real server and a real socket."""

import asyncio

import httpx
from litestar import Litestar
from sqlalchemy import delete, update

from tests.conftest import ManualClock, until
from tests.server.sample import KEY
from tests.server.streams import events, serving
from vpn_sentinel.server.access import revoke_token
from vpn_sentinel.server.api.events import TunnelEncoder, stream
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store import schema
from vpn_sentinel.server.store.store import Store


async def test_changes_arrive_and_the_stream_ends_with_the_hub(
    api: Litestar, store: Store, hub: Hub, filled: dict[str, int], free_port: int
) -> None:
    key = {"X-API-Key": KEY}
    async with (
        asyncio.timeout(10),
        serving(api, free_port) as url,
        httpx.AsyncClient() as client,
        client.stream("GET", f"{url}/api/v1/events", headers=key) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        stream = events(response)
        waiting = asyncio.ensure_future(anext(stream))
        await until(lambda: hub.listeners == 1)
        await store.write(update(schema.tunnels).where(schema.tunnels.c.name == "media-nl").values(state="down"))
        hub.publish({"media-nl"})
        kind, frame = await waiting
        listed = (await client.get(f"{url}/api/v1/tunnels/media-nl", headers=key)).json()
        assert (kind, frame) == ("tunnels", {"tunnels": [listed], "gone": []})
        assert listed["state"] == "down"

        await store.write(delete(schema.tunnels).where(schema.tunnels.c.name == "cabin-no"))
        hub.publish({"cabin-no", "office-ch"})
        _, frame = await anext(stream)
        assert ([t["name"] for t in frame["tunnels"]], frame["gone"]) == (["office-ch"], ["cabin-no"])

        started = asyncio.get_running_loop().time()
        hub.close()
        assert [e async for e in stream] == []
        assert asyncio.get_running_loop().time() - started < 0.5


async def test_a_stream_ends_with_its_key(
    api: Litestar,
    store: Store,
    hub: Hub,
    clock: ManualClock,
    filled: dict[str, int],
    free_port: int,
    shared_token: str,
) -> None:
    async with (
        asyncio.timeout(10),
        serving(api, free_port) as url,
        httpx.AsyncClient(headers={"X-API-Key": shared_token}) as client,
        client.stream("GET", f"{url}/api/v1/events") as response,
    ):
        frames = events(response)
        waiting = asyncio.ensure_future(anext(frames))
        await until(lambda: hub.listeners == 1)
        hub.publish({"media-nl"})
        assert (await waiting)[0] == "tunnels"
        await revoke_token(store, "reader", clock.now)
        clock.now += 5.1
        hub.publish({"media-nl"})
        assert [e async for e in frames] == []
        assert hub.listeners == 0


async def test_an_idle_stream_ends_with_its_key_too(store: Store, hub: Hub) -> None:
    answers = iter([True, True, False])

    async def may_read() -> bool:
        return next(answers)

    async with asyncio.timeout(5):
        frames = [f async for f in stream(hub, TunnelEncoder(store), may_read, idle=0.01)]
    assert frames[1:] == [b": still here\n\n"] * 2


async def test_a_tunnel_is_encoded_once_for_all_streams(store: Store, filled: dict[str, int]) -> None:
    encoder = TunnelEncoder(store)
    first, second = await encoder.changed({"media-nl"}), await encoder.changed({"media-nl"})
    assert encoder._kept["media-nl"][1] == bytes(first.tunnels[0])
    kept = encoder._kept["media-nl"][1]
    await encoder.changed({"media-nl"})
    assert encoder._kept["media-nl"][1] is kept
    await store.write(update(schema.tunnels).where(schema.tunnels.c.name == "media-nl").values(last_seen=5.0))
    assert bytes((await encoder.changed({"media-nl"})).tunnels[0]) != bytes(second.tunnels[0])
