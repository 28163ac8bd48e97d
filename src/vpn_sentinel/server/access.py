"""Authentication by keys, and the limit on wrong ones.

Nothing is open by default. A caller sends a key in `X-API-Key` (or as a bearer token): either a shared key, which may
report under any name and read everything, or one tunnel's token, which may only report as that tunnel.
"""

import asyncio
import hmac
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from sqlalchemy import insert, select, update

from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import unquoted
from vpn_sentinel.server.client import client_of
from vpn_sentinel.server.store.schema import tokens
from vpn_sentinel.server.store.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

_PREFIX_CHARS: Final = 8
_KEY_MARK: Final = "vs_"
# A token that was revoked elsewhere may be accepted from memory for this time.
_MAX_CACHE_AGE_S: Final = 5.0
# The table is read again for a key that is not in memory, as it may be new, but not more often than this.
_MIN_REREAD_INTERVAL_S: Final = 1.0
# Wrong keys from one client: keys are too long to be guessed, so this only bounds the cost of guessing.
WRONG_KEYS_PER_MINUTE: Final = 20
_MINUTE_S: Final = 60.0
# Bounds of: clients whose wrong keys are counted, pairs of client and right key, log lines about wrong keys.
MAX_WRONG_KEY_CLIENTS: Final = 100_000
MAX_RIGHT_KEYS: Final = 100_000
LOG_LINES_PER_MINUTE: Final = 30


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a valid key. `name` is the token's; only a shared key may report as another tunnel, or read.

    `key` identifies the key and is not secret: the prefix that lists of tokens show, "" for the setting's key.
    """

    name: str
    shared: bool
    key: str = ""

    def may_report_as(self, tunnel: str) -> bool:
        return self.shared or self.name == tunnel

    def may_be_reference_for(self, site: str) -> bool:
        """Whether it may report for the home connection of `site`: any token's could accuse other tunnels otherwise."""
        return self.shared or self.name == site


class TooManyWrongKeys(Exception):
    """This address sent too many wrong keys. `retry_after` in seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("too many wrong keys from this address")
        self.retry_after = retry_after


class Access:
    """Checks keys against the `VPN_SENTINEL_API_KEY` setting and the `tokens` table."""

    def __init__(self, store: Store, clock: Clock, api_key: Secret | None) -> None:
        self._store = store
        self._clock = clock
        self._own_digest = _digest(unquoted(api_key.reveal())) if api_key is not None else None
        self._tokens: Mapping[str, tuple[str, Caller]] = {}
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()
        self._reads = 0
        self._failed: StoreUnavailable | None = None
        self._wrong_keys = _WrongKeys()
        self._right_keys: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def admit(self, key: str, ip: IPAddress | None) -> Caller | None:
        """The caller from `ip` with `key`, None for a wrong key. Raises TooManyWrongKeys and StoreUnavailable.

        After too many wrong keys from an address in a minute, right keys are refused there too. Only a key that was
        accepted from this address before is still accepted, so that somebody behind the same exit locks nobody out.
        """
        client, digest = client_of(ip) if ip is not None else "none", _digest(key)
        known = (client, digest) in self._right_keys
        now = self._clock.boottime()
        self._wrong_keys.log_finished(now)
        if not known:
            self._wrong_keys.check(client, now)
        if not self._is_own(digest):
            await self._refresh(key, digest)
        # No await from here on, so that concurrent guesses are counted one by one.
        now = self._clock.boottime()
        if not known:
            self._wrong_keys.check(client, now)
        found = self._match(key, digest)
        if found is None:
            self._right_keys.pop((client, digest), None)
            self._wrong_keys.add(client, now)
            return None
        self._right_keys[client, digest] = None
        self._right_keys.move_to_end((client, digest))
        if len(self._right_keys) > MAX_RIGHT_KEYS:
            self._right_keys.popitem(last=False)
        return found

    async def caller(self, key: str | None) -> Caller | None:
        """The caller with `key`, or None; for one that was admitted before. Raises StoreUnavailable."""
        if not key:
            return None
        given = _digest(key)
        if not self._is_own(given):
            await self._refresh(key, given)
        return self._match(key, given)

    def _is_own(self, given: str) -> bool:
        return self._own_digest is not None and hmac.compare_digest(given, self._own_digest)

    def _match(self, key: str, given: str) -> Caller | None:
        """Compare `key` in constant time with the tokens in memory."""
        if self._is_own(given):
            return Caller("shared", shared=True)
        found = self._tokens.get(_prefix_of(key))
        if found is None or not hmac.compare_digest(found[0], given):
            return None
        return found[1]

    async def _refresh(self, key: str, given: str) -> None:
        """Read the table when the copy in memory is old, or does not hold `key`."""
        age = self._clock.boottime() - self._read_at
        if age <= _MIN_REREAD_INTERVAL_S or (age <= _MAX_CACHE_AGE_S and self._match(key, given) is not None):
            return
        reads = self._reads
        async with self._reading:
            if self._reads == reads:
                await self._reload()
            elif self._failed is not None:  # another caller's read failed while this one waited for it
                raise self._failed.with_traceback(None)

    async def _reload(self) -> None:
        try:
            rows = await self._store.read(select(tokens).where(tokens.c.revoked_at.is_(None)))
        except StoreUnavailable as e:
            self._reads, self._failed = self._reads + 1, e
            raise
        self._reads, self._failed = self._reads + 1, None
        self._tokens = {r.prefix: (r.digest, Caller(r.name, shared=bool(r.shared), key=r.prefix)) for r in rows}
        self._read_at = self._clock.boottime()


@dataclass(slots=True)
class _WrongKeyMinute:
    """One client's current minute: its begin, its wrong keys, and how many of them are not logged yet."""

    since: float
    wrong: int = 0
    unlogged: int = 0


class _WrongKeys:
    """Counts and logs wrong keys by client, in a bounded map, oldest minute first."""

    def __init__(self) -> None:
        self._by_client: OrderedDict[str, _WrongKeyMinute] = OrderedDict()
        self._lines = 0
        self._lines_since = float("-inf")

    def check(self, client: str, now: float) -> None:
        """Raises TooManyWrongKeys; such a refusal is counted and logged as one more wrong key."""
        minute = self._by_client.get(client)
        if minute is not None and minute.wrong >= WRONG_KEYS_PER_MINUTE and now - minute.since < _MINUTE_S:
            minute.unlogged += 1
            raise TooManyWrongKeys(minute.since + _MINUTE_S - now)

    def add(self, client: str, now: float) -> None:
        """Count a wrong key. A client's first one is logged at once, the others when its minute is over."""
        self.log_finished(now)
        minute = self._by_client.get(client)
        if minute is None:
            minute = self._by_client[client] = _WrongKeyMinute(now)
            self._log(client, 1, now)
            if len(self._by_client) > MAX_WRONG_KEY_CLIENTS:
                self._by_client.popitem(last=False)
        else:
            minute.unlogged += 1
        minute.wrong += 1

    def log_finished(self, now: float) -> None:
        """Log and close the minutes that are over."""
        while self._by_client:
            client, minute = next(iter(self._by_client.items()))
            if now - minute.since < _MINUTE_S:
                return
            del self._by_client[client]
            if minute.unlogged:
                self._log(client, minute.unlogged, now)
                self._by_client[client] = _WrongKeyMinute(now)

    def _log(self, client: str, times: int, now: float) -> None:
        if now - self._lines_since >= _MINUTE_S:
            self._lines, self._lines_since = 0, now
        self._lines += 1
        if self._lines < LOG_LINES_PER_MINUTE:
            log.warning("wrong keys were sent", extra={"address": client, "times": times})
        elif self._lines == LOG_LINES_PER_MINUTE:
            log.warning("many addresses sent wrong keys; no more of them are logged this minute")


async def create_token(
    store: Store, name: str, *, shared: bool, now: float, show: Callable[[str], None] = lambda _: None
) -> str:
    """Create and return a token called `name`; only its digest is stored. `show` is called before it is valid.

    Raises ValueError when the name is in use.
    """
    taken = await store.read(select(tokens.c.id).where(tokens.c.name == name, tokens.c.revoked_at.is_(None)))
    if taken:
        msg = f"a token called {name} exists; revoke it first"
        raise ValueError(msg)
    token = _KEY_MARK + secrets.token_urlsafe(32)
    row = {
        "name": name,
        "shared": int(shared),
        "prefix": _prefix_of(token),
        "digest": _digest(token),
        "created_at": now,
    }
    show(token)
    await store.write(insert(tokens).values(row))
    return token


async def revoke_token(store: Store, name: str, now: float, *, shared: bool | None = None) -> bool:
    """Revoke the token called `name`; False when there is none. Running servers refuse it within 5 s.

    With `shared` given, only a token of that kind.
    """
    kind = () if shared is None else (tokens.c.shared == int(shared),)
    found = await store.write(
        update(tokens)
        .where(tokens.c.name == name, tokens.c.revoked_at.is_(None), *kind)
        .values(revoked_at=now)
        .returning(tokens.c.id)
    )
    return bool(found[0])


async def first_key(store: Store, now: float, show: Callable[[str], None]) -> bool:
    """Create a shared key when there never was one; returns whether it did. `show` prints it before it is stored.

    A server that is killed in between shows another key at its next start. In the other order there would be a stored
    key that nobody has seen, and no other would ever be created.
    """
    if await store.read(select(tokens.c.id).where(tokens.c.shared == 1).limit(1)):
        return False
    await create_token(store, "shared", shared=True, now=now, show=show)
    return True


def key_from(headers: Mapping[str, str]) -> str | None:
    """The key in `X-API-Key` or `Authorization: Bearer`; header names are lower case.

    Docker passes the quotes in an env file on, and clients of the replaced program send them with the key.
    """
    if key := headers.get("x-api-key"):
        return unquoted(key) or None
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return unquoted(token) or None if scheme.lower() == "bearer" else None


def _digest(key: str) -> str:
    # Tokens hold 256 random bits, so a fast hash protects them; the setting's key is never stored.
    return blake2b(key.encode("utf-8", "surrogateescape"), digest_size=32, person=b"vs-token").hexdigest()


def _prefix_of(key: str) -> str:
    return key.removeprefix(_KEY_MARK)[:_PREFIX_CHARS]
