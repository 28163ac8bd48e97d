"""`vpn-sentinel tunnel list|show`. As JSON they print the API's responses at `/tunnels` and `/tunnels/{name}`."""

import argparse
import sys
from typing import Any, Final

from vpn_sentinel.cli.database import add_database, with_store
from vpn_sentinel.cli.output import local_time, printable, table

_MAX_TRANSITIONS: Final = 20


def add(commands: Any) -> None:
    parser = commands.add_parser("tunnel", help="list and show the watched tunnels")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    listed = verbs.add_parser("list", help="all tunnels with their states")
    show = verbs.add_parser("show", help="one tunnel: findings and last transitions")
    show.add_argument("name", metavar="NAME")
    for verb, func in ((listed, _list), (show, _show)):
        add_database(verb)
        verb.add_argument("--json", action="store_true", help="print JSON")
        verb.set_defaults(func=func)


def _list(args: argparse.Namespace) -> int:
    import msgspec

    from vpn_sentinel.server.store import queries
    from vpn_sentinel.wire import rest

    found = with_store(args, lambda store, _: queries.all_tunnels(store))
    if args.json:
        print(msgspec.json.encode(rest.Tunnels(tunnels=found)).decode())
        return 0
    if not found:
        print("no tunnel has reported yet")
        return 0
    table(
        ("NAME", "STATE", "SINCE", "EXIT", "COUNTRY", "LAST SEEN"),
        [
            (
                t.name,
                t.state,
                local_time(t.since.timestamp()),
                t.exit.ipv4 or t.exit.ipv6 or "-",
                t.place.country or "-",
                local_time(t.last_seen.timestamp() if t.last_seen else None),
            )
            for t in found
        ],
    )
    return 0


def _show(args: argparse.Namespace) -> int:
    import msgspec

    from vpn_sentinel.server.store import queries

    found = with_store(args, lambda store, _: queries.tunnel_detail(store, args.name))
    if found is None:
        print(f"vpn-sentinel: there is no tunnel called {printable(args.name)}", file=sys.stderr)
        return 1
    tunnel = found.tunnel
    if args.json:
        print(msgspec.json.encode(tunnel).decode())
        return 0
    print(f"{tunnel.name} is {tunnel.state} since {local_time(tunnel.since.timestamp())}")
    for finding in tunnel.findings:
        print(f"  {finding.code}: {printable(finding.message)}")
    moves = found.transitions[:_MAX_TRANSITIONS]
    table(("AT", "FROM", "TO"), [(local_time(m.at), m.old, m.new) for m in moves])
    return 0
