"""For commands that work on the database itself, with or without a running server."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vpn_sentinel.cli.settings import add_config, server_settings
from vpn_sentinel.runtime.settings import PREFIX, SettingError

if TYPE_CHECKING:
    from vpn_sentinel.server.settings import ServerSettings
    from vpn_sentinel.server.store.store import Store

T = TypeVar("T")


def add_database(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--data-dir", dest="DATA_DIR", metavar="FOLDER", help="the server's data folder")
    parser.add_argument("--database-url", dest="DATABASE_URL", metavar="URL", help="sqlite:///PATH or postgresql://…")


def with_store(
    args: argparse.Namespace,
    work: "Callable[[Store, ServerSettings], Awaitable[T]]",
    *,
    create: bool = False,
) -> T:
    """Open the server's store, run `work`, close it. Raises SettingError, StoreUnusable, StoreUnavailable.

    Without `create` a missing file is an error: the folder is probably misspelt.
    """
    from vpn_sentinel.server.store.open import open_store

    settings = server_settings(args)
    if not create:
        _check_file_exists(settings)

    async def run() -> T:
        with setting_named(settings):
            store = await open_store(settings.database_url)
        try:
            return await work(store, settings)
        finally:
            await store.close()

    return asyncio.run(run())


@contextmanager
def setting_named(settings: "ServerSettings") -> Iterator[None]:
    """Name the setting to change when the database's file cannot be opened, and the backup for a damaged one.

    Raises SettingError or StoreDamaged instead of the store's own error.
    """
    from vpn_sentinel.server.store.backup import restore_hint
    from vpn_sentinel.server.store.store import StoreDamaged, StoreUnusable

    try:
        yield
    except StoreDamaged as e:
        folder = settings.backup_folder
        remedy = restore_hint(folder) if folder else ""
        if not remedy:
            raise
        raise StoreDamaged(f"{e}; {remedy}") from e
    except StoreUnusable as e:
        if not _is_file(settings) or not isinstance(e.__cause__, OSError):
            raise
        raise SettingError(_setting(settings), str(e)) from e.__cause__


def _check_file_exists(settings: "ServerSettings") -> None:
    """Raises StoreUnusable when there is no database yet, SettingError when its file cannot be examined."""
    from vpn_sentinel.server.store.store import StoreUnusable

    if not _is_file(settings):
        return
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    try:
        path.stat()
    except FileNotFoundError:
        msg = f"there is no database at {path}: a server makes it when it starts, or `vpn-sentinel db migrate`"
        raise StoreUnusable(msg) from None
    except OSError as e:
        raise SettingError(_setting(settings), f"{path}: {e.strerror}") from e


def _is_file(settings: "ServerSettings") -> bool:
    return settings.database_url.startswith("sqlite:")


def _setting(settings: "ServerSettings") -> str:
    """The setting that names the file."""
    usual = settings.database_url == f"sqlite:///{settings.data_dir}/sentinel.db"
    return PREFIX + ("DATA_DIR" if usual else "DATABASE_URL")
