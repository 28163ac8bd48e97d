"""Connections to PostgreSQL that rely on no session: what one transaction leaves behind, the next does not need.

Between us and the server may be a pooler that gives each transaction another session (PgBouncer, pool_mode =
transaction; https://www.pgbouncer.org/features.html). So statements have no name, none is kept, nothing is SET, and
nothing is asked outside of a transaction when a connection opens.
"""

import getpass
import os
import ssl
from typing import Any, Final
from urllib.parse import quote

import asyncpg
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from vpn_sentinel.server.store.address import PostgresAddress

_COMMAND_TIMEOUT: Final = 30.0
# What asyncpg raises before it has a connection, beside its own errors: bad files, no user, no home, a refusal.
CONNECT_ERRORS: Final = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # one that is the wrong kind of server raises it
)


class Dialect(PGDialect_asyncpg):
    """SQLAlchemy's, which sends queries of its own outside of a transaction as a connection opens: for JSON columns,
    of which there are none here."""

    supports_statement_cache = True

    async def setup_asyncpg_json_codec(self, conn: Any) -> None:
        """No column is JSON."""

    async def setup_asyncpg_jsonb_codec(self, conn: Any) -> None:
        """No column is JSONB."""


registry.register("postgresql.vpn_sentinel", __name__, "Dialect")


def engine(address: PostgresAddress, **options: Any) -> AsyncEngine:
    """An engine for `address`; `options` are those of `create_async_engine`."""
    return create_async_engine(
        "postgresql+vpn_sentinel://",
        connect_args={
            "async_creator_fn": lambda *_words, **_more: connect(address),
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: "",
        },
        **options,
    )


async def connect(address: PostgresAddress) -> "asyncpg.Connection[Any]":
    """Connect to the first host that answers and is of the kind that is asked for. Raises one of CONNECT_ERRORS.

    One after the other, each with its own time, as libpq does: the driver alone would give all of them the time of one.
    """
    sessions = ("standby", "any") if address.session == "prefer-standby" else (address.session,)
    error: BaseException | None = None
    for session in sessions:
        for host in address.hosts or (None,):
            try:
                return await _connect(address, host, session)
            except CONNECT_ERRORS as e:
                error = e
    assert error is not None  # noqa: S101 - there is one host at least
    raise error


async def _connect(address: PostgresAddress, host: tuple[str, int] | None, session: str) -> "asyncpg.Connection[Any]":
    tls = dict(address.tls)
    context: ssl.SSLContext | None = None
    if tls.get("sslrootcert") == "system":  # implies verify-full, as for libpq
        context = ssl.create_default_context()
        tls = {}
    return await asyncpg.connect(
        "postgresql://?" + "&".join(f"{name}={quote(value, safe='')}" for name, value in tls.items()) if tls else None,
        host=host[0] if host else None,
        port=host[1] if host else None,
        user=address.user or os.getenv("PGUSER") or _user(),  # noqa: TID251 - libpq's own variable
        password=address.password,
        passfile=address.passfile,
        database=address.database,
        ssl=context,
        timeout=address.timeout,
        command_timeout=_COMMAND_TIMEOUT,
        statement_cache_size=0,
        server_settings=dict(address.settings),
        target_session_attrs=session,
    )


def _user() -> str:
    """The system user's name, as libpq takes it. Raises OSError where this user has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError) as e:
        msg = "the address names no user, and this system user has no name: write postgresql://USER@…, or set PGUSER"
        raise OSError(msg) from e


def said(error: BaseException, address: PostgresAddress) -> str:
    """Why a connection failed, in one line that holds no password."""
    why: BaseException = getattr(error, "orig", None) or error
    text = " ".join(str(why).split())
    if isinstance(why, TimeoutError):
        text = f"no answer within {address.timeout:g} s"
    elif asyncpg.TargetServerAttributeNotMatched in (type(why), type(why.__cause__)):
        text = f"no host is what target_session_attrs={address.session} asks for"
    elif isinstance(why, OSError):
        text = words(why) or text
    for secret in (address.password, address.tls.get("sslpassword")):
        if secret:
            text = text.replace(secret, "***")
    return text or type(why).__name__


def words(error: OSError) -> str:
    """What the system or TLS says of a failure, "" where neither says anything.

    TLS failures are OSErrors with a number of their own, which is no errno; and so are those of getaddrinfo(3).
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error.strerror or 'no reason is given'}"
    if error.errno is None or not error.strerror:
        return ""
    return os.strerror(error.errno) if error.errno > 0 else error.strerror
