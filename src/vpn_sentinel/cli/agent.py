"""`vpn-sentinel agent`: watch this network namespace and report to the server."""

import argparse
from typing import Any

from vpn_sentinel.cli.process import run_until_stopped
from vpn_sentinel.cli.settings import add_config, source_of, warn_idle, warn_unknown
from vpn_sentinel.runtime import logs
from vpn_sentinel.runtime.clock import SystemClock


def add(commands: Any) -> None:
    parser = commands.add_parser("agent", help="watch the tunnel of this network namespace and report")
    add_config(parser)
    parser.add_argument("--url", dest="URL", metavar="URL", help="the server's address; commas separate several")
    parser.add_argument(
        "--client-id", dest="CLIENT_ID", metavar="NAME", help="the tunnel's name (default: this host's)"
    )
    parser.add_argument(
        "--interface", dest="TUNNEL_INTERFACE", metavar="NAME", help="the tunnel's interface (default: found)"
    )
    parser.add_argument("--role", dest="ROLE", metavar="ROLE", help="tunnel, or reference for a site's reference agent")
    parser.add_argument(
        "--site", dest="SITE", metavar="NAME", help="the home where this runs; its agents share the name"
    )
    parser.add_argument("--data-dir", dest="DATA_DIR", metavar="FOLDER", help="the data folder, where reports wait")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from vpn_sentinel.agent import app, reference
    from vpn_sentinel.agent.role import REFERENCE
    from vpn_sentinel.agent.settings import AgentSettings

    source = source_of(args)
    settings = AgentSettings.read(source)
    warn_unknown(source, "agent")
    warn_idle(source, "agent")
    logs.open_log(debug=settings.debug, file=settings.log_file)
    work = reference.run if settings.role == REFERENCE else app.run
    return run_until_stopped(lambda stop: work(settings, SystemClock(), stop), fast=False)
