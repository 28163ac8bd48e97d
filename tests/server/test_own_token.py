"""The token that `vpn-sentinel up` makes for the agent beside it: on both engines."""

from pathlib import Path

import pytest

from tests.conftest import ManualClock
from vpn_sentinel.cli.up import _local_key
from vpn_sentinel.runtime.settings import SettingError
from vpn_sentinel.server.access import Access, create_token, revoke_token
from vpn_sentinel.server.store.store import Store


async def test_the_name_of_a_shared_token_is_one_line(store: Store, clock: ManualClock, tmp_path: Path) -> None:
    await create_token(store, "nas", shared=True, now=clock.wall())
    with pytest.raises(SettingError, match=r"^VPN_SENTINEL_CLIENT_ID: nas is the name of a shared token"):
        await _local_key(store, tmp_path / "agent.token", "nas", clock)


async def test_it_is_kept_and_replaced_once_it_is_revoked(store: Store, clock: ManualClock, tmp_path: Path) -> None:
    kept = tmp_path / "agent.token"
    first = await _local_key(store, kept, "here", clock)
    assert (await _local_key(store, kept, "here", clock)).reveal() == first.reveal()
    for damaged in (b"\xff\xfe", b"here \x01", b"here"):
        kept.write_bytes(damaged)
        await revoke_token(store, "here", clock.wall())
        first = await _local_key(store, kept, "here", clock)
        assert kept.read_text() == f"here {first.reveal()}\n"
    await revoke_token(store, "here", clock.wall())
    second = await _local_key(store, kept, "here", clock)
    access = Access(store, clock, None)
    assert await access.caller(first.reveal()) is None
    caller = await access.caller(second.reveal())
    assert caller is not None
    assert caller.may_report_as("here")
