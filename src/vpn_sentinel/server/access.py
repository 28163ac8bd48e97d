"""Who may call: the peer's real address, the allow-list, and the keys.

Nothing is open by default. A caller shows a key in `X-API-Key` (or as a bearer token): either a shared key, which may
report under any name and read everything, or one tunnel's token, which may only report as that tunnel.
"""

import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from sqlalchemy import insert, select, update

from vpn_sentinel.domain.policy import IPAddress, IPNetwork
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.server.store.schema import tokens
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.wire.codec import address

_PREFIX: Final = 8
_MARK: Final = "vs_"
# How long a token that was revoked elsewhere may still be taken from memory, in seconds.
_FRESH: Final = 5.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Someone whose key is right. `name` is the token's; only a shared one may report as another tunnel or read."""

    name: str
    shared: bool

    def may_report_as(self, tunnel: str) -> bool:
        return self.shared or self.name == tunnel


class Access:
    """Checks keys against the `VPN_SENTINEL_API_KEY` setting and the `tokens` table."""

    def __init__(self, store: Store, clock: Clock, api_key: Secret | None) -> None:
        self._store = store
        self._clock = clock
        self._own_digest = _digest(api_key.reveal()) if api_key is not None else None
        self._tokens: Mapping[str, tuple[str, Caller]] = {}
        self._read_at = float("-inf")

    async def caller(self, key: str | None) -> Caller | None:
        """Who holds `key`, or None. Compares in constant time. Raises StoreUnavailable."""
        if not key:
            return None
        given = _digest(key)
        if self._own_digest is not None and hmac.compare_digest(given, self._own_digest):
            return Caller("shared", shared=True)
        if self._clock.boottime() - self._read_at > _FRESH:
            await self._reload()
        found = self._tokens.get(_prefix_of(key))
        if found is None or not hmac.compare_digest(found[0], given):
            return None
        return found[1]

    async def _reload(self) -> None:
        rows = await self._store.read(select(tokens).where(tokens.c.revoked_at.is_(None)))
        self._tokens = {r.prefix: (r.digest, Caller(r.name, shared=bool(r.shared))) for r in rows}
        self._read_at = self._clock.boottime()


async def create_token(store: Store, name: str, *, shared: bool, now: float) -> str:
    """Make a token called `name`, and return it: it is kept nowhere. Raises ValueError when the name is in use."""
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


async def first_key(store: Store, now: float) -> str | None:
    """Make a shared key when there never was one, and return it to be printed once; None otherwise."""
    if await store.read(select(tokens.c.id).where(tokens.c.shared == 1).limit(1)):
        return None
    return await create_token(store, "shared", shared=True, now=now)


def peer(remote: str, forwarded_for: str | None, trusted: Iterable[IPNetwork]) -> IPAddress:
    """The address that a request really came from.

    `X-Forwarded-For` is believed only from a trusted proxy, and read from its end: the first address there that is not
    itself a trusted proxy. Raises ValueError when `remote` is no address.
    """
    trusted = tuple(trusted)
    found = address(remote.partition("%")[0])
    for hop in reversed((forwarded_for or "").split(",")):
        if not inside(found, trusted) or not hop.strip():
            break
        try:
            found = address(hop.strip())
        except ValueError:
            break
    return found


def inside(ip: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    return any(ip.version == n.version and ip in n for n in networks)


def key_from(headers: Mapping[str, str]) -> str | None:
    """The key in `X-API-Key` or `Authorization: Bearer`; header names are lower case."""
    if key := headers.get("x-api-key"):
        return key
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _digest(key: str) -> str:
    # Tokens hold 256 random bits, so a fast hash keeps them; the setting's key is never stored.
    return blake2b(key.encode("utf-8", "surrogateescape"), digest_size=32, person=b"vs-token").hexdigest()


def _prefix_of(key: str) -> str:
    return key.removeprefix(_MARK)[:_PREFIX]
