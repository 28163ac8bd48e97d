"""Keys, tokens, and who guesses."""

import asyncio
import logging
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

import pytest
from sqlalchemy import Executable, Row, select

from tests.conftest import ManualClock
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.server.access import (
    Access,
    Caller,
    TooManyWrongKeys,
    create_token,
    first_key,
    key_from,
    revoke_token,
)
from vpn_sentinel.server.store.schema import tokens
from vpn_sentinel.server.store.store import Store, StoreUnavailable

KEY = Secret("a-shared-key-of-ours")


async def test_the_settings_key_may_do_everything(store: Store, clock: ManualClock) -> None:
    access = Access(store, clock, KEY)
    caller = await access.caller(KEY.reveal())
    assert caller == Caller("shared", shared=True)
    assert caller.may_report_as("anything")


async def test_a_wrong_key_is_nobodys(store: Store, clock: ManualClock) -> None:
    for key in (None, "", "wrong", "a-shared-key-of-our", "a-shared-key-of-ours ", "\udcff", "ä" * 99):
        assert await Access(store, clock, KEY).caller(key) is None
        assert await Access(store, clock, None).caller(key) is None


async def test_a_token_may_report_as_its_own_tunnel_alone(store: Store, clock: ManualClock) -> None:
    token = await create_token(store, "nl", shared=False, now=clock.now)
    caller = await Access(store, clock, KEY).caller(token)
    assert caller == Caller("nl", shared=False, key=token[3:11])
    assert caller.may_report_as("nl")
    assert not caller.may_report_as("nl-2")
    assert not caller.may_report_as("NL")


async def test_a_shared_token_may_report_as_any(store: Store, clock: ManualClock) -> None:
    token = await create_token(store, "fleet", shared=True, now=clock.now)
    caller = await Access(store, clock, None).caller(token)
    assert caller is not None
    assert caller.may_report_as("anything")


async def test_a_token_is_kept_nowhere(store: Store, clock: ManualClock) -> None:
    token = await create_token(store, "nl", shared=False, now=clock.now)
    assert token.startswith("vs_")
    assert len(token) > 40
    (row,) = await store.read(select(tokens))
    kept = " ".join(str(v) for v in row)
    assert token not in kept
    assert token.removeprefix("vs_")[8:] not in kept


async def test_a_token_with_a_known_beginning_and_another_end_is_nobodys(store: Store, clock: ManualClock) -> None:
    token = await create_token(store, "nl", shared=False, now=clock.now)
    access = Access(store, clock, None)
    assert await access.caller(token) is not None
    assert await access.caller(token[:-1] + ("A" if token[-1] != "A" else "B")) is None
    assert await access.caller(token[:11]) is None


async def test_a_name_is_in_use_until_its_token_is_revoked(store: Store, clock: ManualClock) -> None:
    old = await create_token(store, "nl", shared=False, now=clock.now)
    with pytest.raises(ValueError, match="a token called nl exists; revoke it first"):
        await create_token(store, "nl", shared=False, now=clock.now)
    assert await revoke_token(store, "nl", clock.now)
    new = await create_token(store, "nl", shared=False, now=clock.now)
    access = Access(store, clock, None)
    assert await access.caller(old) is None
    assert await access.caller(new) is not None


async def test_a_revoked_token_is_refused_within_five_seconds(store: Store, clock: ManualClock) -> None:
    token = await create_token(store, "nl", shared=False, now=clock.now)
    access = Access(store, clock, None)
    assert await access.caller(token) is not None
    assert await revoke_token(store, "nl", clock.now)
    clock.now += 5.1
    assert await access.caller(token) is None


async def test_there_is_nothing_to_revoke_twice(store: Store, clock: ManualClock) -> None:
    assert not await revoke_token(store, "nl", clock.now)
    await create_token(store, "nl", shared=False, now=clock.now)
    assert await revoke_token(store, "nl", clock.now)
    assert not await revoke_token(store, "nl", clock.now)


async def test_the_first_key_is_made_once(store: Store, clock: ManualClock) -> None:
    shown: list[str] = []
    assert await first_key(store, clock.now, shown.append)
    (key,) = shown
    assert await Access(store, clock, None).caller(key) == Caller("shared", shared=True, key=key[3:11])
    assert not await first_key(store, clock.now, shown.append)
    await revoke_token(store, "shared", clock.now)
    assert not await first_key(store, clock.now, shown.append)  # who revoked it does not want another
    assert shown == [key]


async def test_a_first_key_that_could_not_be_shown_is_not_the_last(store: Store, clock: ManualClock) -> None:
    def killed(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await first_key(store, clock.now, killed)
    shown: list[str] = []
    assert await first_key(store, clock.now, shown.append)
    assert len(shown) == 1


class Counted:
    """Counts reads, and fails when a test says so."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.reads = 0
        self.gone = False

    async def read(self, statement: Executable) -> Sequence[Row[Any]]:
        if self.gone:
            raise StoreUnavailable("unreachable", "connection refused")
        self.reads += 1
        await asyncio.sleep(0)
        return await self._store.read(statement)


async def test_guessing_does_not_ask_the_database_each_time(store: Store, clock: ManualClock) -> None:
    counted = Counted(store)
    access = Access(counted, clock, KEY)  # type: ignore[arg-type]
    for n in range(100):
        assert await access.caller(f"guess-{n}") is None
    assert counted.reads == 1


async def test_the_shared_key_needs_no_database_and_the_others_say_that_it_is_gone(
    store: Store, clock: ManualClock
) -> None:
    counted = Counted(store)
    counted.gone = True
    access = Access(counted, clock, KEY)  # type: ignore[arg-type]
    assert await access.caller(KEY.reveal()) is not None
    with pytest.raises(StoreUnavailable):
        await access.caller("vs_something")


async def test_a_token_that_was_just_made_is_known_within_a_second(store: Store, clock: ManualClock) -> None:
    counted = Counted(store)
    access = Access(counted, clock, None)  # type: ignore[arg-type]
    assert await access.caller("vs_nothing") is None
    token = await create_token(store, "nl", shared=False, now=clock.now)
    assert await access.caller(token) is None
    clock.now += 1.1
    assert await access.caller(token) == Caller("nl", shared=False, key=token[3:11])
    for _ in range(50):
        assert await access.caller("vs_nothing") is None
    assert counted.reads == 2


async def test_who_asks_at_once_shares_one_look(store: Store, clock: ManualClock) -> None:
    token = await create_token(store, "nl", shared=False, now=clock.now)
    counted = Counted(store)
    access = Access(counted, clock, None)  # type: ignore[arg-type]
    assert None not in await asyncio.gather(*(access.admit(token, HERE) for _ in range(50)))
    assert counted.reads == 1


async def test_a_look_that_failed_fails_for_all_who_waited(store: Store, clock: ManualClock) -> None:
    class Gone:
        asked = 0

        async def read(self, _: object) -> None:
            self.asked += 1
            await asyncio.sleep(0)
            raise StoreUnavailable("unreachable", "connection refused")

    gone = Gone()
    access = Access(gone, clock, None)  # type: ignore[arg-type]
    ends = await asyncio.gather(*(access.caller(f"vs_{n}") for n in range(5)), return_exceptions=True)
    assert [type(e) for e in ends] == [StoreUnavailable] * 5
    assert gone.asked == 1


# -- who guesses

HERE, THERE = ip_address("146.70.1.2"), ip_address("146.70.9.9")


async def guess(access: Access, times: int, ip: Any = HERE) -> int:
    """Show wrong keys; how many of them were looked at."""
    looked = 0
    for n in range(times):
        try:
            assert await access.admit(f"guess-{n}", ip) is None
        except TooManyWrongKeys as e:
            assert 0 < e.retry_after <= 60  # noqa: PT017
        else:
            looked += 1
    return looked


async def test_a_flood_of_guesses_does_not_learn_the_key(store: Store, clock: ManualClock) -> None:
    token = await create_token(store, "nl", shared=False, now=clock.now)
    access = Access(store, clock, KEY)
    assert await guess(access, 50) == 20
    for right in (KEY.reveal(), token):
        with pytest.raises(TooManyWrongKeys):
            await access.admit(right, HERE)
        assert await access.admit(right, THERE) is not None
    clock.now += 60
    assert await access.admit(KEY.reveal(), HERE) is not None


async def test_guesses_that_come_at_once_are_counted_one_by_one(store: Store, clock: ManualClock) -> None:
    access = Access(Counted(store), clock, KEY)  # type: ignore[arg-type]
    ends = await asyncio.gather(*(access.admit(f"guess-{n}", HERE) for n in range(100)), return_exceptions=True)
    assert ends.count(None) == 20
    assert sum(isinstance(e, TooManyWrongKeys) for e in ends) == 80


async def test_a_key_that_was_right_here_before_still_is(store: Store, clock: ManualClock) -> None:
    token = await create_token(store, "nl", shared=False, now=clock.now)
    access = Access(store, clock, KEY)
    assert await access.admit(token, HERE) is not None
    await guess(access, 50)
    assert await access.admit(token, HERE) == Caller("nl", shared=False, key=token[3:11])
    with pytest.raises(TooManyWrongKeys):
        await access.admit(KEY.reveal(), HERE)
    await revoke_token(store, "nl", clock.now)
    clock.now += 5.1
    assert await access.admit(token, HERE) is None  # once; from then on it is a guess like others
    with pytest.raises(TooManyWrongKeys):
        await access.admit(token, HERE)


async def test_an_ipv6_customer_is_one_guesser(store: Store, clock: ManualClock) -> None:
    access = Access(store, clock, KEY)
    assert sum([await guess(access, 1, ip_address(f"2a0d::{n:x}")) for n in range(1, 31)]) == 20
    assert await guess(access, 1, ip_address("2a0d:0:0:1::1")) == 1


async def test_guesses_are_told_of_once_a_minute(
    store: Store, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[tuple[str, int]]:
        lines = [(r.__dict__["address"], r.__dict__["times"]) for r in caplog.records]
        caplog.clear()
        return lines

    access = Access(store, clock, KEY)
    await guess(access, 50)
    assert "guess" not in caplog.text
    assert told() == [("146.70.1.2", 1)]
    clock.now += 60
    await access.admit(KEY.reveal(), THERE)
    assert told() == [("146.70.1.2", 49)]
    assert await guess(access, 1) == 1
    assert told() == []
    clock.now += 60
    await access.admit(KEY.reveal(), THERE)
    assert told() == [("146.70.1.2", 1)]
    clock.now += 60
    await access.admit(KEY.reveal(), THERE)
    await guess(access, 1)
    assert told() == [("146.70.1.2", 1)]


async def test_many_guessers_do_not_fill_the_log(
    store: Store, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    access = Access(store, clock, KEY)
    for n in range(200):
        await guess(access, 1, ip_address(f"198.51.100.{n}"))
    assert len(caplog.records) == 30
    assert "many addresses" in caplog.messages[-1]


async def test_what_is_remembered_of_callers_is_bounded(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpn_sentinel.server.access.MAX_WRONG_KEY_CLIENTS", 5)
    monkeypatch.setattr("vpn_sentinel.server.access.MAX_RIGHT_KEYS", 5)
    access = Access(store, clock, KEY)
    for n in range(20):
        await guess(access, 1, ip_address(f"198.51.100.{n}"))
        assert await access.admit(KEY.reveal(), ip_address(f"203.0.113.{n}")) is not None
    assert len(access._wrong_keys._by_client) == len(access._right_keys) == 5


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({}, None),
        ({"x-api-key": "k"}, "k"),
        ({"authorization": "Bearer k"}, "k"),
        ({"authorization": "bearer  k "}, "k"),
        ({"authorization": "Bearer "}, None),
        ({"authorization": "Basic k"}, None),
        ({"x-api-key": "", "authorization": "Bearer k"}, "k"),
        ({"x-api-key": "a", "authorization": "Bearer b"}, "a"),
        ({"x-api-key": '"a b"'}, "a b"),  # as Docker hands an env file's value to an old client
        ({"authorization": "Bearer 'k'"}, "k"),
        ({"x-api-key": '""'}, None),
    ],
)
def test_the_key_in_the_headers(headers: dict[str, str], key: str | None) -> None:
    assert key_from(headers) == key
