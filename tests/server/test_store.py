"""Both engines, behind the one door."""

from sqlalchemy import insert, select

from vpn_sentinel.server.store import rows
from vpn_sentinel.server.store.schema import meta, tunnels
from vpn_sentinel.server.store.store import Changes, Store


async def test_what_is_written_is_read(store: Store) -> None:
    await store.write(insert(meta).values(key="a", value="1"))
    assert [tuple(r) for r in await store.read(select(meta))] == [("a", "1")]
    await store.ping()


async def test_transact_creates_and_saves(store: Store) -> None:
    def decide(found):
        row = found["nl"]
        row.state = "leaking"
        return Changes([(rows.SAVE_TUNNEL, [rows.saved_tunnel(row)])])

    await store.transact(["nl"], 5.0, decide, create=True)
    assert [r.state for r in await store.read(select(tunnels))] == ["leaking"]
