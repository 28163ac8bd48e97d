"""`vpn-sentinel geo`: the offline geolocation databases."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpn_sentinel.cli.output import local_time, printable, table
from vpn_sentinel.cli.settings import add_config, source_of, warn_idle, warn_unknown
from vpn_sentinel.domain.counted import counted
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.settings import PREFIX, SettingError

if TYPE_CHECKING:
    from vpn_sentinel.agent.geo.settings import GeoSettings
    from vpn_sentinel.agent.geo.sources import Vendor


def add(commands: Any) -> None:
    parser = commands.add_parser("geo", help="download and show the offline databases of places")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    update = verbs.add_parser(
        "update",
        help="download the newest, verify and install it",
        epilog="A running agent loads it within a minute. If anything fails, the old one stays in use.",
    )
    add_config(update)
    _folder(update)
    from_where = update.add_mutually_exclusive_group()
    from_where.add_argument(
        "--source", choices=("dbip", "maxmind"), help="the source (MaxMind if its key is set, else DB-IP Lite)"
    )
    from_where.add_argument(
        "--file",
        metavar="FILE",
        action="append",
        help="a file to install: .mmdb, .mmdb.gz, .tar.gz; may be repeated",
    )
    update.set_defaults(func=run_update)
    show = verbs.add_parser("show", help="what is installed: source, age, whether it is intact, whom to credit")
    add_config(show)
    _folder(show)
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(func=run_show)


def _folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        dest="DATA_DIR",
        metavar="FOLDER",
        help="the agent's data folder; the databases are in `geo` in it",
    )


# --- update ---


def run_update(args: argparse.Namespace) -> int:
    from vpn_sentinel.agent.geo.databases import day
    from vpn_sentinel.agent.geo.fetch import Bounds, Web, terminal_progress
    from vpn_sentinel.agent.geo.update import update
    from vpn_sentinel.agent.net.http import tls_context

    settings = _settings(args)
    try:
        tls = tls_context(settings.ca_file)
    except OSError as e:
        raise SettingError(PREFIX + "CA_FILE", f"{settings.ca_file} holds no usable certificates") from e
    clock = SystemClock()
    web = Web(tls, clock, bounds=Bounds(), progress=terminal_progress())
    done = update(_vendor(settings, args), settings.folder, web, clock)
    if not done.changed:
        print("is current already")
    for file in done.collection.files:
        print(f"{done.collection.source}: {printable(file.type)} of {day(file.built)}, {' and '.join(file.holds)}")
    if done.collection.credit:
        print(done.collection.credit)
    if settings.files:
        print(f"Note: {PREFIX}GEO_DB is set, so the agent reads {printable(settings.files)} and not these.")
    return 0


def _settings(args: argparse.Namespace) -> "GeoSettings":
    from vpn_sentinel.agent.geo.settings import GeoSettings

    source = source_of(args)
    settings = GeoSettings.read(source)
    warn_unknown(source, "geo")
    warn_idle(source, "geo")
    return settings


def _vendor(settings: "GeoSettings", args: argparse.Namespace) -> "Vendor":
    from vpn_sentinel.agent.geo.fetch import DownloadLogin
    from vpn_sentinel.agent.geo.sources import dbip, from_files, maxmind

    if args.file:
        return from_files(tuple(Path(f) for f in args.file))
    account = settings.maxmind_account
    if args.source == "dbip" or (args.source is None and account is None):
        return dbip(settings.dbip_url)
    if account is None:
        raise SettingError(
            PREFIX + "MAXMIND_ACCOUNT",
            f"is not set: MaxMind asks for an account and {PREFIX}MAXMIND_KEY; both are free",
        )
    return maxmind(settings.maxmind_url, DownloadLogin(account=account, key=settings.maxmind_key))


# --- show ---


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of `geo show`. Times are seconds since the epoch; `state` is "whole", "damaged" or "missing"."""

    source: str
    type: str
    holds: tuple[str, ...]
    built: int | None
    days: int | None
    fetched: float | None
    sha256: str | None
    state: str
    origin: str


def run_show(args: argparse.Namespace) -> int:
    from vpn_sentinel.agent.geo.databases import OLD_DAYS, TOO_OLD_DAYS
    from vpn_sentinel.agent.geo.store import read_manifest

    settings = _settings(args)
    rows = _rows(settings, SystemClock().wall())
    manifest = read_manifest(settings.folder)
    credits_ = [c.credit for c in manifest.collections if c.credit] if manifest else []
    if args.json:
        shown = [{field: getattr(row, field) for field in _Row.__slots__} for row in rows]
        print(
            json.dumps({"folder": str(settings.folder), "files": shown, "credit": credits_, "instead": settings.files})
        )
        return 0
    if settings.files:
        print(f"{PREFIX}GEO_DB is set: the agent reads {printable(settings.files)} and nothing below.")
    if not rows:
        print(
            f"No database in {settings.folder}: places come from services alone. `vpn-sentinel geo update` fetches one."
        )
        return 0
    table(
        ("SOURCE", "TYPE", "HOLDS", "AGE", "FETCHED", "STATE"),
        [
            (
                r.source,
                r.type,
                " and ".join(r.holds),
                _age(r.days, OLD_DAYS, TOO_OLD_DAYS),
                local_time(r.fetched),
                r.state,
            )
            for r in rows
        ],
    )
    for line in dict.fromkeys(credits_):
        print(line)
    return 0


def _rows(settings: "GeoSettings", now: float) -> list[_Row]:
    from vpn_sentinel.agent.geo.databases import days_old
    from vpn_sentinel.agent.geo.store import GeoError, loose_files, named, read_manifest
    from vpn_sentinel.agent.geo.update import intact
    from vpn_sentinel.agent.geo.verify import examine

    manifest = read_manifest(settings.folder)
    found = []
    for collection in manifest.collections if manifest else ():
        for entry in collection.files:
            there = (settings.folder / Path(entry.name).name).is_file()
            state = "missing" if not there else "whole" if intact(settings.folder, entry) else "damaged"
            found.append(
                _Row(
                    collection.source, entry.type, entry.holds, entry.built, int(days_old(entry.built, now)),
                    collection.fetched, entry.sha256, state, entry.origin,
                )
            )  # fmt: skip
    if manifest is not None:
        return found
    for path in loose_files(settings.folder):
        try:
            with named(str(path)):
                facts = examine(path, now, "")
            days = int(days_old(facts.built, now))
            row = _Row("mmdb", facts.type, facts.holds, facts.built, days, None, None, "whole", str(path))
        except GeoError as e:
            row = _Row("mmdb", "-", (), None, None, None, None, f"damaged: {e}", str(path))
        found.append(row)
    return found


def _age(days: int | None, old: float, too_old: float) -> str:
    if days is None:
        return "-"
    words = "much too old" if days >= too_old else "old" if days >= old else ""
    return f"{counted(days, 'day')}{f', {words}' if words else ''}"
