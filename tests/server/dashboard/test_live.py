"""The live stream through a real server and a real socket."""

import asyncio

import httpx
from litestar import Litestar
from sqlalchemy import delete, update

from tests.server.streams import events, serving
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store import schema
from vpn_sentinel.server.store.store import Store


async def test_rows_follow_their_tunnels(
    dashboard: Litestar, store: Store, hub: Hub, filled: dict[str, int], free_port: int
) -> None:
    async with (
        asyncio.timeout(10),
        serving(dashboard, free_port) as url,
        httpx.AsyncClient() as browser,
        browser.stream("GET", f"{url}/live") as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        stream = events(response)
        kind, frame = await anext(stream)
        assert (kind, len(frame["rows"]), frame["title"]) == ("all", 7, "1 leaking – VPN Sentinel")

        await store.write(update(schema.tunnels).where(schema.tunnels.c.name == "media-nl").values(state="leaking"))
        hub.publish({"media-nl"})
        kind, frame = await anext(stream)
        assert (kind, [(r["name"], r["state"]) for r in frame["rows"]]) == ("some", [("media-nl", "leaking")])
        assert frame["title"] == "2 leaking – VPN Sentinel"
        assert 'id="t-media-nl"' in frame["rows"][0]["html"]

        await store.write(delete(schema.tunnels).where(schema.tunnels.c.name == "cabin-no"))
        hub.publish({"cabin-no"})
        kind, frame = await anext(stream)
        assert (frame["rows"], frame["gone"], frame["total"]) == ([], ["cabin-no"], 6)

        started = asyncio.get_running_loop().time()
        hub.close()
        assert [e async for e in stream] == []
        assert asyncio.get_running_loop().time() - started < 0.5


async def test_a_server_that_stops_does_not_wait_for_browsers(dashboard: Litestar, hub: Hub, free_port: int) -> None:
    async with asyncio.timeout(10), httpx.AsyncClient() as browser:
        async with serving(dashboard, free_port) as url, browser.stream("GET", f"{url}/live") as response:
            await anext(events(response))
            hub.close()
            started = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - started < 1
