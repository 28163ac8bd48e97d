"""Which tunnels' pulses a server answers after its start: what it reads from the database, on both engines."""

import asyncio

from sqlalchemy import insert

from tests.conftest import ManualClock, until
from tests.server.ingest.test_pulse import Agent, Port
from tests.server.sample import tunnel
from vpn_sentinel.server.access import create_token, revoke_token
from vpn_sentinel.server.ingest.pulse import KnownTunnels, known_names
from vpn_sentinel.server.store.schema import tunnels
from vpn_sentinel.server.store.store import Store


async def _hold(store: Store, now: float, *names: str) -> None:
    await store.write(insert(tunnels).values([tunnel(name, "protected", now) for name in names]))


async def test_the_tunnels_of_the_database_are_known_but_not_those_whose_tokens_are_revoked(
    store: Store, clock: ManualClock
) -> None:
    await _hold(store, clock.now, "shared-key", "own", "revoked", "renewed", "revoked-twice")
    for name, times in (("revoked", 1), ("renewed", 1), ("revoked-twice", 2), ("no-tunnel", 1)):
        for _ in range(times):
            await create_token(store, name, shared=False, now=clock.now)
            await revoke_token(store, name, clock.now)
    for name in ("own", "renewed"):
        await create_token(store, name, shared=False, now=clock.now)
    assert list(await known_names(store)) == ["shared-key", "own", "renewed"]


async def test_who_reported_since_came_by_another_key(store: Store, clock: ManualClock) -> None:
    await _hold(store, clock.now, "nl", "de")
    await create_token(store, "nl", shared=False, now=clock.now - 60)
    await revoke_token(store, "nl", clock.now - 60)
    await create_token(store, "de", shared=True, now=clock.now)  # a shared one that is merely called so
    await revoke_token(store, "de", clock.now)
    assert list(await known_names(store)) == ["nl", "de"]


async def test_a_revoked_agents_pulse_key_stays_refused_after_a_restart(store: Store, clock: ManualClock) -> None:
    await _hold(store, clock.now, "nl", "de")
    await create_token(store, "nl", shared=False, now=clock.now)
    await revoke_token(store, "nl", clock.now)
    port, revoked, other = Port(), Agent("nl"), Agent("de")  # a registry that has never heard of anybody
    known = KnownTunnels(port.registry, lambda: known_names(store), min_interval_s=0.01)
    task = asyncio.create_task(known.run())
    await until(lambda: len(port.registry) == 1)
    assert port.gets(other.pulse()) is not None
    assert port.gets(revoked.pulse()) is None
    await _hold(store, clock.now, "se")
    known.refresh()  # which the revoked agent's pulse brings about as well
    await until(lambda: len(port.registry) == 2)
    assert port.gets(revoked.pulse()) is None
    port.registry.greet("nl", "key")  # it came with a valid key
    assert port.gets(revoked.pulse()) is not None
    task.cancel()


async def test_a_new_token_is_known_when_the_name_is_read_again(store: Store, clock: ManualClock) -> None:
    await _hold(store, clock.now, "nl")
    await create_token(store, "nl", shared=False, now=clock.now)
    await revoke_token(store, "nl", clock.now)
    assert list(await known_names(store)) == []
    await create_token(store, "nl", shared=False, now=clock.now)
    assert list(await known_names(store)) == ["nl"]
