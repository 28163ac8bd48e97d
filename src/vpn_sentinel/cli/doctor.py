"""`vpn-sentinel doctor`: what can and cannot be seen from here, what that means, and how to mend it."""

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vpn_sentinel.cli.reading import add_config, source_of, unread
from vpn_sentinel.cli.showing import printable
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.settings import SettingError, Source, environment

if TYPE_CHECKING:
    from vpn_sentinel.agent.doctor.check import Check

_STYLES: Final = {"ok": ("✓", "green"), "gap": ("✗", "bold red"), "unknown": ("?", "yellow")}
_MARGIN: Final = 3  # the mark, and what stands around it


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="explain what can and cannot be seen from here, and how to mend it",
        epilog="Exit status: 0 no gap, 1 gaps, 64 wrong usage. It changes nothing, here or on the server.",
    )
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--data-dir", dest="DATA_DIR", metavar="FOLDER", help="the agent's folder")
    parser.add_argument("--url", dest="URL", metavar="URL", help="the server's address; commas separate several")
    parser.add_argument("--interface", dest="TUNNEL_INTERFACE", metavar="NAME", help="the tunnel's interface (found)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from vpn_sentinel.agent.doctor.check import State
    from vpn_sentinel.agent.doctor.examine import examine
    from vpn_sentinel.agent.doctor.forgiving import read_all

    troubles: tuple[str, ...] = ()
    try:
        source = source_of(args)
    except SettingError as e:  # the file as a whole; the rest can still be looked at
        source, troubles = Source(env=environment()), (str(e),)
    read = read_all(source)
    misspelt = tuple(f"{name}: no such setting; is it misspelt?" for name in unread(source))
    read = replace(read, troubles=(*troubles, *read.troubles, *misspelt))
    logging.getLogger().addHandler(logging.NullHandler())  # what would be logged has a line of its own here
    found = asyncio.run(examine(read, SystemClock()))
    if args.json:
        print(json.dumps({"checks": [as_plain(check) for check in found]}))
    else:
        show(found)
    return 1 if any(check.state is State.GAP for check in found) else 0


def as_plain(check: "Check") -> dict[str, str]:
    return {
        "name": check.name,
        "state": check.state.value,
        "found": check.found,
        "means": check.means,
        "fix": check.fix,
    }


def show(found: Sequence["Check"]) -> None:
    """Print for people: aligned, coloured on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    width = max(len(check.name) for check in found)
    indent = " " * (width + _MARGIN + 1)
    for check in found:
        mark, style = _STYLES[check.state]
        name = printable(check.name).ljust(width)
        console.print(Text.assemble((f"{mark} ", style), (f"{name}  ", "dim"), printable(check.found)))
        if check.means:
            console.print(Text(f"{indent}{_sentence(printable(check.means))}", style="dim"))
        if check.fix:
            console.print(Text(f"{indent}→ {printable(check.fix)}"))
    counts = {state: sum(c.state == state for c in found) for state in _STYLES}
    console.print(Text(f"{counts['ok']} ok, {counts['gap']} gaps, {counts['unknown']} unknown"))
    sys.stdout.flush()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
