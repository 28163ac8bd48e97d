"""`vpn-sentinel token create|list|revoke`."""

import argparse
import json
import sys
from typing import Any

from vpn_sentinel.cli.database import add_database, with_store
from vpn_sentinel.cli.output import local_time, table
from vpn_sentinel.domain.tunnel import tunnel_name
from vpn_sentinel.runtime.clock import SystemClock


def add(commands: Any) -> None:
    parser = commands.add_parser("token", help="create, list and revoke agents' credentials")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    create = verbs.add_parser("create", help="make a token and print it, once")
    create.add_argument("name", metavar="NAME", type=_name, help="the tunnel that may report with it")
    create.add_argument("--shared", action="store_true", help="may report under any name, and read everything")
    listed = verbs.add_parser("list", help="list tokens: names, kinds, dates")
    revoke = verbs.add_parser("revoke", help="refuse a token from now on")
    revoke.add_argument("name", metavar="NAME")
    for verb, func in ((create, _create), (listed, _list), (revoke, _revoke)):
        add_database(verb)
        verb.add_argument("--json", action="store_true", help="print JSON")
        verb.set_defaults(func=func)


def _name(text: str) -> str:
    try:
        return tunnel_name(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _create(args: argparse.Namespace) -> int:
    from vpn_sentinel.server.access import create_token

    now = SystemClock().wall()
    try:
        made = with_store(
            args, lambda store, _: create_token(store, args.name, shared=args.shared, now=now), create=True
        )
    except ValueError as e:
        print(f"vpn-sentinel: {e}", file=sys.stderr)
        return 1
    print(json.dumps({"name": args.name, "shared": args.shared, "token": made}) if args.json else made)
    return 0


def _list(args: argparse.Namespace) -> int:
    from sqlalchemy import select

    from vpn_sentinel.server.store.schema import tokens

    rows = with_store(args, lambda store, _: store.read(select(tokens).order_by(tokens.c.created_at)))
    listed = [
        {"name": r.name, "shared": bool(r.shared), "created_at": r.created_at, "revoked_at": r.revoked_at} for r in rows
    ]
    if args.json:
        print(json.dumps(listed))
        return 0
    table(
        ("NAME", "KIND", "CREATED", "REVOKED"),
        [
            (r.name, "shared" if r.shared else "tunnel", local_time(r.created_at), local_time(r.revoked_at))
            for r in rows
        ],
    )
    return 0


def _revoke(args: argparse.Namespace) -> int:
    from vpn_sentinel.server.access import revoke_token

    now = SystemClock().wall()
    if not with_store(args, lambda store, _: revoke_token(store, args.name, now)):
        print(f"vpn-sentinel: there is no token called {args.name}", file=sys.stderr)
        return 1
    print(json.dumps({"name": args.name, "revoked": True}) if args.json else f"{args.name} is revoked")
    return 0
