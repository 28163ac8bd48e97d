"""`vpn-sentinel server`."""

import argparse
import asyncio
from typing import Any

from vpn_sentinel.cli.database import setting_named
from vpn_sentinel.cli.process import report, run_until_stopped
from vpn_sentinel.cli.settings import add_config, server_settings, warn_idle
from vpn_sentinel.runtime import logs
from vpn_sentinel.runtime.clock import SystemClock


def add(commands: Any) -> None:
    parser = commands.add_parser("server", help="receive and judge reports, keep the history, notify")
    add_config(parser)
    parser.add_argument(
        "--api-port", dest="SERVER_API_PORT", metavar="PORT", help="REST API, agents, UDP echo (default: 5000)"
    )
    parser.add_argument(
        "--dashboard-port", dest="SERVER_DASHBOARD_PORT", metavar="PORT", help="dashboard (default: 8080)"
    )
    parser.add_argument(
        "--health-port", dest="SERVER_HEALTH_PORT", metavar="PORT", help="health and metrics (default: 8081)"
    )
    parser.add_argument("--database-url", dest="DATABASE_URL", metavar="URL", help="sqlite:///PATH or postgresql://…")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from vpn_sentinel.server.app import serve

    settings = server_settings(args, also=lambda source: warn_idle(source, "server"))
    logs.open_log(debug=settings.debug, file=settings.log_file)

    async def work(stop: asyncio.Event) -> None:
        with setting_named(settings):
            await serve(settings, SystemClock(), stop, report)

    return run_until_stopped(work, fast=True)
