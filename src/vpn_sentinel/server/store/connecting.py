"""Connections to PostgreSQL that keep no state in the session: no transaction needs what an earlier one left there.

A pooler may give each transaction another session (PgBouncer, pool_mode = transaction;
https://www.pgbouncer.org/features.html). So prepared statements have no name and are not cached, nothing is SET, and
opening a connection runs no query outside a transaction.
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

_COMMAND_TIMEOUT_S: Final = 30.0
# What asyncpg raises before it has a connection, besides its own errors: bad files, no user, no home, a refusal.
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
    """SQLAlchemy's dialect without the queries that it sends outside a transaction when a connection opens: they are
    for JSON columns, and there are none here."""

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
    """Connect to the first host that answers and meets target_session_attrs. Raises one of CONNECT_ERRORS.

    The hosts are tried in turn, each with its own timeout, as libpq does; asyncpg alone applies one timeout to all.
    """
    sessions = ("standby", "any") if address.session == "prefer-standby" else (address.session,)
    error: BaseException | None = None
    for session in sessions:
        for host in address.hosts or (None,):
            try:
                return await _connect(address, host, session)
            except CONNECT_ERRORS as e:
                error = e
    assert error is not None  # noqa: S101 - there is at least one host
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
        user=address.user or os.getenv("PGUSER") or _system_user(),  # noqa: TID251 - libpq's own variable
        password=address.password,
        passfile=address.passfile,
        database=address.database,
        ssl=context,
        timeout=address.timeout,
        command_timeout=_COMMAND_TIMEOUT_S,
        statement_cache_size=0,
        server_settings=dict(address.settings),
        target_session_attrs=session,
    )


def _system_user() -> str:
    """The system user's name, which is libpq's default. Raises OSError where this user has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError) as e:
        msg = "the address names no user, and this system user has no name: write postgresql://USER@…, or set PGUSER"
        raise OSError(msg) from e


def failure_text(error: BaseException, address: PostgresAddress) -> str:
    """Why a connection failed, in one line that holds no password."""
    why: BaseException = getattr(error, "orig", None) or error
    text = " ".join(str(why).split())
    if isinstance(why, TimeoutError):
        text = f"no answer within {address.timeout:g} s"
    elif asyncpg.TargetServerAttributeNotMatched in (type(why), type(why.__cause__)):
        text = f"no host meets target_session_attrs={address.session}"
    elif isinstance(why, OSError):
        text = os_error_text(why) or text
    for secret in (address.password, address.tls.get("sslpassword")):
        if secret:
            text = text.replace(secret, "***")
    return text or type(why).__name__


def os_error_text(error: OSError) -> str:
    """The system's or TLS's text of a failure, "" where there is none.

    TLS failures are OSErrors whose number is no errno; so are those of getaddrinfo(3).
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error.strerror or 'no reason is given'}"
    if error.errno is None or not error.strerror:
        return ""
    return os.strerror(error.errno) if error.errno > 0 else error.strerror
