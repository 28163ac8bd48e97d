"""`vpn-sentinel doctor`: what can and cannot be seen from here, what that means, and how to repair it."""

import argparse
import asyncio
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vpn_sentinel.cli.settings import add_config, source_of, unknown
from vpn_sentinel.cli.terminal import of_stdout
from vpn_sentinel.domain.counted import counted
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.settings import SettingError, Source, environment

if TYPE_CHECKING:
    from vpn_sentinel.agent.doctor.check import Check

# The mark, its ASCII replacement where the output's encoding lacks it, and its style.
_STYLES: Final = {"ok": ("✓", "+", "green"), "gap": ("✗", "x", "bold red"), "unknown": ("?", "?", "yellow")}
_MARGIN_COLUMNS: Final = 4  # the mark and a space before a check's name, two spaces after it


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="explain what can and cannot be seen from here, and how to fix it",
        epilog="Exit status: 0 no gap, 1 one gap or more, 64 wrong usage. It changes nothing, here or on the server.",
    )
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--data-dir", dest="DATA_DIR", metavar="FOLDER", help="the agent's data folder")
    parser.add_argument("--url", dest="URL", metavar="URL", help="the server's address; commas separate several")
    parser.add_argument(
        "--interface", dest="TUNNEL_INTERFACE", metavar="NAME", help="the tunnel's interface (default: found)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from vpn_sentinel.agent.doctor.check import CheckState
    from vpn_sentinel.agent.doctor.examine import examine
    from vpn_sentinel.agent.doctor.lenient import read_all

    troubles: tuple[str, ...] = ()
    try:
        source = source_of(args)
    except SettingError as e:  # the file as a whole; the rest can still be checked
        source, troubles = Source(env=environment()), (str(e),)
    read = read_all(source)
    read = replace(read, troubles=(*troubles, *read.troubles, *unknown(source, "agent", "geo")))
    logging.getLogger().addHandler(logging.NullHandler())  # what would be logged has its own line in the output
    found = asyncio.run(examine(read, SystemClock()))
    if args.json:
        print(json.dumps({"checks": [as_json(check) for check in found]}))
    else:
        show(found)
    return 1 if any(check.state is CheckState.GAP for check in found) else 0


def as_json(check: "Check") -> dict[str, str]:
    return {
        "name": check.name,
        "state": check.state.value,
        "found": check.found,
        "means": check.means,
        "fix": check.fix,
    }


def show(found: Sequence["Check"]) -> None:
    """Print for people: aligned, coloured on a terminal."""
    terminal = of_stdout()
    arrow = terminal.printable_or("→", "->")
    width = max(len(check.name) for check in found)
    indent = width + _MARGIN_COLUMNS
    for check in found:
        mark, plain, style = _STYLES[check.state]
        lead = ((f"{terminal.printable_or(mark, plain)} ", style), (f"{check.name.ljust(width)}  ", "dim"))
        terminal.line(check.found, lead=lead, indent=indent)
        if check.means:
            terminal.line(_sentence(check.means), "dim", lead=((" " * indent, ""),))
        if check.fix:
            terminal.command(f"{arrow} {check.fix}", indent=indent)
    counts = {state: sum(c.state == state for c in found) for state in _STYLES}
    terminal.line(f"{counts['ok']} ok, {counted(counts['gap'], 'gap')}, {counts['unknown']} unknown")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
