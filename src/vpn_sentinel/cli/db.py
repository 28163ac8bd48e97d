"""`vpn-sentinel db migrate|check|backup|restore`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpn_sentinel.cli.database import add_database, with_store
from vpn_sentinel.cli.settings import server_settings
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.user_error import UserError

if TYPE_CHECKING:
    from vpn_sentinel.server.settings import ServerSettings
    from vpn_sentinel.server.store.store import Store


def add(commands: Any) -> None:
    parser = commands.add_parser("db", help="migrate, check, back up or restore the database")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, purpose, work in (
        ("migrate", "bring the schema up to date (the server does so too when it starts)", _migrate),
        ("check", "check every page for damage, count the rows", _check),
        ("backup", "back up a SQLite database now, also while a server runs", _backup),
        ("restore", "replace a SQLite database by a backup; the old one is kept", _restore),
    ):
        verb = verbs.add_parser(name, help=purpose)
        add_database(verb)
        if name in ("backup", "restore"):
            verb.add_argument("--backup-dir", dest="BACKUP_DIR", metavar="FOLDER", help="the folder of the backups")
        if name == "restore":
            verb.add_argument("file", nargs="?", type=Path, metavar="FILE", help="which backup (default: the newest)")
        verb.set_defaults(func=work)


def _migrate(args: argparse.Namespace) -> int:
    from sqlalchemy import func, select

    from vpn_sentinel.server.store.schema import tunnels

    async def work(store: "Store", _settings: "ServerSettings") -> None:
        await store.read(select(func.count()).select_from(tunnels))

    with_store(args, work, create=True)
    print("the schema is up to date")
    return 0


def _check(args: argparse.Namespace) -> int:
    """Raises UserError for a damaged database; status 1 too for a loss of data that was not reported yet."""
    from sqlalchemy import func, select

    from vpn_sentinel.server.store import backup
    from vpn_sentinel.server.store.open import DAMAGE_KEY
    from vpn_sentinel.server.store.schema import incidents, meta, observations, outbox, tunnels
    from vpn_sentinel.server.store.sqlite import SqliteStore

    async def work(store: "Store", settings: "ServerSettings") -> tuple[dict[str, int], str]:
        if isinstance(store, SqliteStore) and (wrong := await store.run_long(backup.integrity_problem)):
            file, folder = settings.database_file, settings.backup_folder
            todo = f"; {backup.remedy(folder)}" if folder else ""
            raise UserError(f"database {file} is damaged: {wrong}{todo}")
        counts = {}
        for table in (tunnels, observations, incidents, outbox):
            counts[table.name] = int((await store.read(select(func.count()).select_from(table)))[0][0])
        lost = await store.read(select(meta.c.value).where(meta.c.key == DAMAGE_KEY))
        return counts, lost[0].value if lost else ""

    counts, lost = with_store(args, work)
    for name, count in counts.items():
        print(f"{name}: {count}")
    if lost:
        print(f"lost: {lost}")
    return 1 if lost else 0


def _backup(args: argparse.Namespace) -> int:
    from vpn_sentinel.server.store import backup
    from vpn_sentinel.server.store.sqlite import SqliteStore

    async def work(store: "Store", settings: "ServerSettings") -> backup.Backup:
        assert isinstance(store, SqliteStore)  # noqa: S101 - it has a file
        _, folder = _places(settings)
        now = SystemClock().wall()
        return await store.run_long(lambda connection: backup.make_backup(connection, folder, now))

    _places(server_settings(args))
    print(with_store(args, work).path)
    return 0


def _restore(args: argparse.Namespace) -> int:
    from vpn_sentinel.server.store import backup

    file, folder = _places(server_settings(args))
    chosen = args.file or next((b.path for b in backup.backups(folder)), None)
    if chosen is None:
        raise UserError(f"{folder} holds no backup")
    aside = backup.restore(file, chosen)
    print(f"{file} is {chosen} now" + (f"; what it was is kept as {aside}" if aside else ""))
    return 0


def _places(settings: "ServerSettings") -> tuple[Path, Path]:
    """The database's file, and the folder of backups. Raises UserError for PostgreSQL."""
    if settings.database_file is None or settings.backup_folder is None:
        raise UserError("backups of a PostgreSQL database are made and put back by its own tools (pg_dump, pg_restore)")
    return settings.database_file, settings.backup_folder
