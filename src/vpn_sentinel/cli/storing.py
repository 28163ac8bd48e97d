"""Commands that work on the database itself, beside a running server or without one."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from vpn_sentinel.cli.reading import add_config, server_settings
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.store import Store, StoreUnusable

T = TypeVar("T")


def add_database(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--data-dir", dest="DATA_DIR", metavar="FOLDER", help="where the server keeps its database")
    parser.add_argument("--database-url", dest="DATABASE_URL", metavar="URL", help="sqlite:///PATH or postgresql://…")


def with_store(
    args: argparse.Namespace, work: Callable[[Store, ServerSettings], Awaitable[T]], *, create: bool = False
) -> T:
    """Open the server's store, run `work`, close it. Raises SettingError, StoreUnusable, StoreUnavailable.

    Without `create` a file that is not there is an error: the folder is probably mistyped.
    """
    settings = server_settings(args)
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    if settings.database_url.startswith("sqlite:") and not create and not path.exists():
        msg = f"there is no database at {path}: a server makes it when it starts, or `vpn-sentinel db migrate`"
        raise StoreUnusable(msg)

    async def run() -> T:
        store = await open_store(settings.database_url)
        try:
            return await work(store, settings)
        finally:
            await store.close()

    return asyncio.run(run())
