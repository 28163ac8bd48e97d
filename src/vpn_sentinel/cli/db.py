"""`vpn-sentinel db migrate|check`."""

import argparse
from typing import TYPE_CHECKING, Any

from vpn_sentinel.cli.storing import add_database, with_store

if TYPE_CHECKING:
    from vpn_sentinel.server.settings import ServerSettings
    from vpn_sentinel.server.store.store import Store


def add(commands: Any) -> None:
    parser = commands.add_parser("db", help="migrate or check the database")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, purpose, work in (
        ("migrate", "bring the schema up to date (the server does so too when it starts)", _migrate),
        ("check", "open the database, look for damage, count what it holds", _check),
    ):
        verb = verbs.add_parser(name, help=purpose)
        add_database(verb)
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
    from sqlalchemy import func, select

    from vpn_sentinel.server.store.schema import incidents, observations, outbox, tunnels

    async def work(store: "Store", _settings: "ServerSettings") -> dict[str, int]:
        counts = {}
        for table in (tunnels, observations, incidents, outbox):
            counts[table.name] = int((await store.read(select(func.count()).select_from(table)))[0][0])
        return counts

    for name, count in with_store(args, work).items():
        print(f"{name}: {count}")
    return 0
