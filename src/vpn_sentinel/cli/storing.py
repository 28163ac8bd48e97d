"""Commands that work on the database itself, beside a running server or without one."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from vpn_sentinel.cli.reading import add_config, server_settings
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.store import Store

T = TypeVar("T")


def add_database(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--data-dir", dest="DATA_DIR", metavar="FOLDER", help="where the server keeps its database")
    parser.add_argument("--database-url", dest="DATABASE_URL", metavar="URL", help="sqlite:///PATH or postgresql://…")


def with_store(args: argparse.Namespace, work: Callable[[Store, ServerSettings], Awaitable[T]]) -> T:
    """Open the server's store, run `work`, close it. Raises SettingError, StoreUnusable, StoreUnavailable."""
    settings = server_settings(args)

    async def run() -> T:
        store = await open_store(settings.database_url)
        try:
            return await work(store, settings)
        finally:
            await store.close()

    return asyncio.run(run())
