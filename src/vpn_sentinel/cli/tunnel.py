"""`vpn-sentinel tunnel list|show`."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from vpn_sentinel.cli.showing import local_time, printable, table
from vpn_sentinel.cli.storing import add_database, with_store

if TYPE_CHECKING:
    from sqlalchemy import Row


def add(commands: Any) -> None:
    parser = commands.add_parser("tunnel", help="list and show the watched tunnels")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    listed = verbs.add_parser("list", help="all tunnels as they stand")
    show = verbs.add_parser("show", help="one tunnel: findings and what its state did lately")
    show.add_argument("name", metavar="NAME")
    for verb, func in ((listed, _list), (show, _show)):
        add_database(verb)
        verb.add_argument("--json", action="store_true", help="print JSON")
        verb.set_defaults(func=func)


def _list(args: argparse.Namespace) -> int:
    from sqlalchemy import select

    from vpn_sentinel.server.store.schema import tunnels

    rows = with_store(args, lambda store, _: store.read(select(tunnels).order_by(tunnels.c.name)))
    if args.json:
        print(json.dumps([_plain(r) for r in rows]))
        return 0
    if not rows:
        print("no tunnel has reported yet")
        return 0
    table(
        ("NAME", "STATE", "SINCE", "EXIT", "COUNTRY", "LAST SEEN"),
        [
            (
                r.name,
                r.state,
                local_time(r.since),
                r.exit4 or r.exit6 or "-",
                str(json.loads(r.place).get("country") or "-"),
                local_time(r.last_seen or None),
            )
            for r in rows
        ],
    )
    return 0


def _show(args: argparse.Namespace) -> int:
    from sqlalchemy import select

    from vpn_sentinel.server.store.schema import transitions, tunnels

    found = with_store(args, lambda store, _: store.read(select(tunnels).where(tunnels.c.name == args.name)))
    if not found:
        print(f"vpn-sentinel: there is no tunnel called {printable(args.name)}", file=sys.stderr)
        return 1
    row = found[0]
    latest = select(transitions).where(transitions.c.tunnel_id == row.id).order_by(transitions.c.at.desc()).limit(20)
    moves = with_store(args, lambda store, _: store.read(latest))
    if args.json:
        history = [{"at": m.at, "old": m.old, "new": m.new, "findings": json.loads(m.findings)} for m in moves]
        print(json.dumps(_plain(row) | {"transitions": history}))
        return 0
    print(f"{row.name} is {row.state} since {local_time(row.since)}")
    for finding in json.loads(row.findings):
        print(f"  {finding['code']}: {printable(finding['message'])}")
    table(("AT", "FROM", "TO"), [(local_time(m.at), m.old, m.new) for m in moves])
    return 0


def _plain(row: "Row[Any]") -> dict[str, object]:
    return {
        "name": row.name,
        "state": row.state,
        "since": row.since,
        "findings": json.loads(row.findings),
        "exit": {"ipv4": row.exit4, "ipv6": row.exit6} | json.loads(row.place),
        "resolvers": json.loads(row.resolvers),
        "last_seen": row.last_seen or None,
        "version": row.version,
    }
