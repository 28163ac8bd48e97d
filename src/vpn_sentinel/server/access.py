"""Who may call: the keys, and who guesses them.

Nothing is open by default. A caller shows a key in `X-API-Key` (or as a bearer token): either a shared key, which may
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
_MARK: Final = "vs_"
# How long a token that was revoked elsewhere may still be taken from memory, in seconds.
_FRESH_S: Final = 5.0
# How often the table is asked again for a key that is not in memory, in seconds: it may have been made just now.
_MISSED_S: Final = 1.0
# Wrong keys one address may show in a minute: keys are long, this only keeps guessers cheap.
WRONG_KEYS_PER_MINUTE: Final = 20
_MINUTE_S: Final = 60.0
# Addresses whose wrong keys are counted, places where a key was right, and lines a minute about wrong keys.
MAX_GUESSERS: Final = 100_000
MAX_WELCOME: Final = 100_000
LINES_PER_MINUTE: Final = 30


@dataclass(frozen=True, slots=True)
class Caller:
    """Someone whose key is right. `name` is the token's; only a shared one may report as another tunnel or read.

    `key` tells one key from another and is no secret: the beginning that lists of tokens show, "" of the setting's.
    """

    name: str
    shared: bool
    key: str = ""

    def may_report_as(self, tunnel: str) -> bool:
        return self.shared or self.name == tunnel

    def may_stand_for(self, site: str) -> bool:
        """Whether its word counts as the home connection of all tunnels of `site`: else one could accuse another's."""
        return self.shared or self.name == site


class TooManyWrongKeys(Exception):
    """This address guesses. `retry_after` in seconds."""

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
        self._rounds = 0
        self._failed: StoreUnavailable | None = None
        self._guesses = _Guesses()
        self._welcome: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def admit(self, key: str, ip: IPAddress | None) -> Caller | None:
        """Who comes from `ip` with `key`, or None. Raises TooManyWrongKeys and StoreUnavailable.

        Once an address showed too many wrong keys in a minute, a right one is not told from a wrong one there: only a
        key that was right at this address before still is, so that a neighbour behind the same exit locks nobody out.
        """
        where, digest = client_of(ip) if ip is not None else "none", _digest(key)
        known = (where, digest) in self._welcome
        now = self._clock.boottime()
        self._guesses.tell(now)
        if not known:
            self._guesses.check(where, now)
        if not self._is_own(digest):
            await self._refresh(key, digest)
        # From here on nothing waits: guesses that come at once are counted one by one.
        now = self._clock.boottime()
        if not known:
            self._guesses.check(where, now)
        found = self._match(key, digest)
        if found is None:
            self._welcome.pop((where, digest), None)
            self._guesses.add(where, now)
            return None
        self._welcome[where, digest] = None
        self._welcome.move_to_end((where, digest))
        if len(self._welcome) > MAX_WELCOME:
            self._welcome.popitem(last=False)
        return found

    async def caller(self, key: str | None) -> Caller | None:
        """Who holds `key`, or None; for one who was admitted before. Raises StoreUnavailable."""
        if not key:
            return None
        given = _digest(key)
        if not self._is_own(given):
            await self._refresh(key, given)
        return self._match(key, given)

    def _is_own(self, given: str) -> bool:
        return self._own_digest is not None and hmac.compare_digest(given, self._own_digest)

    def _match(self, key: str, given: str) -> Caller | None:
        """Compares in constant time, with what is in memory."""
        if self._is_own(given):
            return Caller("shared", shared=True)
        found = self._tokens.get(_prefix_of(key))
        if found is None or not hmac.compare_digest(found[0], given):
            return None
        return found[1]

    async def _refresh(self, key: str, given: str) -> None:
        """Read the table when what is in memory is old, or when it does not hold `key`."""
        age = self._clock.boottime() - self._read_at
        if age <= _MISSED_S or (age <= _FRESH_S and self._match(key, given) is not None):
            return
        rounds = self._rounds
        async with self._reading:
            if self._rounds == rounds:
                await self._reload()
            elif self._failed is not None:  # who waited for another's attempt shares its end
                raise self._failed.with_traceback(None)

    async def _reload(self) -> None:
        try:
            rows = await self._store.read(select(tokens).where(tokens.c.revoked_at.is_(None)))
        except StoreUnavailable as e:
            self._rounds, self._failed = self._rounds + 1, e
            raise
        self._rounds, self._failed = self._rounds + 1, None
        self._tokens = {r.prefix: (r.digest, Caller(r.name, shared=bool(r.shared), key=r.prefix)) for r in rows}
        self._read_at = self._clock.boottime()


@dataclass(slots=True)
class _Guesser:
    """One address's current minute: when it began, its wrong keys, and how many of them no line told of."""

    since: float
    wrong: int = 0
    unsaid: int = 0


class _Guesses:
    """Wrong keys by address, in a bounded map, oldest minute first; and what is said about them."""

    def __init__(self) -> None:
        self._by_place: OrderedDict[str, _Guesser] = OrderedDict()
        self._lines = 0
        self._lines_since = float("-inf")

    def check(self, where: str, now: float) -> None:
        """Raises TooManyWrongKeys. Such a refusal is told of as one more."""
        guesser = self._by_place.get(where)
        if guesser is not None and guesser.wrong >= WRONG_KEYS_PER_MINUTE and now - guesser.since < _MINUTE_S:
            guesser.unsaid += 1
            raise TooManyWrongKeys(guesser.since + _MINUTE_S - now)

    def add(self, where: str, now: float) -> None:
        """Count a wrong key. The first one of a quiet address is told at once, the others when its minute is over."""
        self.tell(now)
        guesser = self._by_place.get(where)
        if guesser is None:
            guesser = self._by_place[where] = _Guesser(now)
            self._say(where, 1, now)
            if len(self._by_place) > MAX_GUESSERS:
                self._by_place.popitem(last=False)
        else:
            guesser.unsaid += 1
        guesser.wrong += 1

    def tell(self, now: float) -> None:
        """Close the minutes that are over."""
        while self._by_place:
            where, guesser = next(iter(self._by_place.items()))
            if now - guesser.since < _MINUTE_S:
                return
            del self._by_place[where]
            if guesser.unsaid:
                self._say(where, guesser.unsaid, now)
                self._by_place[where] = _Guesser(now)

    def _say(self, where: str, times: int, now: float) -> None:
        if now - self._lines_since >= _MINUTE_S:
            self._lines, self._lines_since = 0, now
        self._lines += 1
        if self._lines < LINES_PER_MINUTE:
            log.warning("wrong keys were shown", extra={"address": where, "times": times})
        elif self._lines == LINES_PER_MINUTE:
            log.warning("wrong keys were shown by many addresses; no more is said of them this minute")


async def create_token(
    store: Store, name: str, *, shared: bool, now: float, show: Callable[[str], None] = lambda _: None
) -> str:
    """Make a token called `name`, and return it: it is kept nowhere. `show` is given it before it is valid.

    Raises ValueError when the name is in use.
    """
    taken = await store.read(select(tokens.c.id).where(tokens.c.name == name, tokens.c.revoked_at.is_(None)))
    if taken:
        msg = f"a token called {name} exists; revoke it first"
        raise ValueError(msg)
    token = _MARK + secrets.token_urlsafe(32)
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
    """Make a shared key when there never was one; whether it was made. `show` prints it, before it is kept.

    A server that is killed in between shows another one when it starts again. The other way round there would be one
    that nobody has seen, and never another.
    """
    if await store.read(select(tokens.c.id).where(tokens.c.shared == 1).limit(1)):
        return False
    await create_token(store, "shared", shared=True, now=now, show=show)
    return True


def key_from(headers: Mapping[str, str]) -> str | None:
    """The key in `X-API-Key` or `Authorization: Bearer`; header names are lower case.

    Docker hands the quotes of an env file over, and a client of the replaced program sends them along.
    """
    if key := headers.get("x-api-key"):
        return unquoted(key) or None
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return unquoted(token) or None if scheme.lower() == "bearer" else None


def _digest(key: str) -> str:
    # Tokens hold 256 random bits, so a fast hash keeps them; the setting's key is never stored.
    return blake2b(key.encode("utf-8", "surrogateescape"), digest_size=32, person=b"vs-token").hexdigest()


def _prefix_of(key: str) -> str:
    return key.removeprefix(_MARK)[:_PREFIX_CHARS]
