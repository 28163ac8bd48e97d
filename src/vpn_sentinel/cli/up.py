"""`vpn-sentinel up`: server and agent together on this machine."""

import argparse
import asyncio
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpn_sentinel.cli.database import setting_named
from vpn_sentinel.cli.process import report, run_until_stopped
from vpn_sentinel.cli.settings import add_config, source_of, warn_idle, warn_unknown
from vpn_sentinel.runtime import files, logs
from vpn_sentinel.runtime.addresses import parse_address
from vpn_sentinel.runtime.clock import Clock, SystemClock
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import PREFIX, SettingError

if TYPE_CHECKING:
    from vpn_sentinel.agent.settings import AgentSettings
    from vpn_sentinel.server.settings import ServerSettings
    from vpn_sentinel.server.store.store import Store


def add(commands: Any) -> None:
    parser = commands.add_parser("up", help="run server and agent together on this machine")
    add_config(parser)
    parser.add_argument("--data-dir", dest="DATA_DIR", metavar="FOLDER", help="the data folder")
    parser.add_argument("--home", dest="HOME_NETWORKS", metavar="CIDR", help="the home's public addresses")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from vpn_sentinel.agent.settings import AgentSettings
    from vpn_sentinel.server.settings import ServerSettings

    # Before any task starts: from a task group, a missing package would not be reported in one line.
    import_module("vpn_sentinel.server.app")
    source = source_of(args)
    # This agent reports to this server, whatever address other agents use.
    source.flags = {**source.flags, "URL": "http://127.0.0.1:5000"}
    serving, watching = ServerSettings.read(source), AgentSettings.read(source)
    warn_unknown(source, "server", "agent")
    warn_idle(source, "server", "agent")
    watching = replace(watching, urls=(_own_url(serving),))
    logs.open_log(debug=serving.debug, file=serving.log_file)
    return run_until_stopped(lambda stop: _both(serving, watching, SystemClock(), stop), fast=True)


def _check_agent_is_allowed(serving: "ServerSettings", host: str) -> None:
    """Raises SettingError where the server would refuse this agent, whose source address is the server's own."""
    try:
        address = parse_address(host)
    except ValueError:  # a name
        return
    if serving.allowed_ips and not any(address in n for n in serving.allowed_ips if n.version == address.version):
        raise SettingError(PREFIX + "SERVER_ALLOWED_IPS", f"needs {address} too, from which the agent here reports")


def _own_url(serving: "ServerSettings") -> str:
    """The URL of this server for this agent. Raises SettingError."""
    if serving.tls_cert is None:
        host = "127.0.0.1" if serving.host in ("::", "0.0.0.0") else serving.host  # noqa: S104 - what it listens on
        _check_agent_is_allowed(serving, host)
        return f"http://{f'[{host}]' if ':' in host else host}:{serving.api_port}"
    if serving.public_url is None:
        raise SettingError(
            PREFIX + "PUBLIC_URL", "is needed with a certificate: the agent here reports to the name it was made for"
        )
    return serving.public_url


async def _both(serving: "ServerSettings", watching: "AgentSettings", clock: Clock, stop: asyncio.Event) -> None:
    from vpn_sentinel.agent import app as agent

    ready: asyncio.Future[Store] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_server(serving, clock, stop, ready))
        store = await ready
        key = serving.api_key or await _local_key(store, serving.data_dir / "agent.token", watching.client_id, clock)
        tasks.create_task(agent.run(replace(watching, api_key=key), clock, stop))
        _print_addresses(serving, watching)


async def _server(
    settings: "ServerSettings", clock: Clock, stop: asyncio.Event, ready: "asyncio.Future[Store]"
) -> None:
    from vpn_sentinel.server import app as server

    try:
        with setting_named(settings):
            await server.serve(settings, clock, stop, report, started=ready.set_result)
    finally:
        # The server's own error says why it failed; the waiting task must not wait for ever.
        if not ready.done():
            ready.cancel()


async def _local_key(store: "Store", path: Path, name: str, clock: Clock) -> Secret:
    """The token of this machine's own agent, made at the first start and kept next to the database."""
    from vpn_sentinel.server.access import Access, create_token, revoke_token

    token = await asyncio.to_thread(_read_token, path, name)
    if token is None or await Access(store, clock, None).caller(token) is None:  # e.g. revoked since
        await revoke_token(store, name, clock.wall(), shared=False)
        try:
            token = await create_token(store, name, shared=False, now=clock.wall())
        except ValueError as e:
            msg = f"{name} is the name of a shared token: give this machine another name"
            raise SettingError(PREFIX + "CLIENT_ID", msg) from e
        await asyncio.to_thread(_keep_token, path, name, token)
    return Secret(token)


def _read_token(path: Path, name: str) -> str | None:
    """The token in the file, None when there is none for `name`, or the file is damaged."""
    try:
        owner, _, token = path.read_text(encoding="utf-8").strip().partition(" ")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    except OSError as e:
        raise SettingError(str(path), str(e.strerror)) from e
    return token if owner == name and token.isascii() and token.isprintable() and token else None


def _keep_token(path: Path, name: str, token: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, f"{name} {token}\n".encode())
    except OSError as e:
        raise SettingError(str(path), str(e.strerror)) from e


def _print_addresses(serving: "ServerSettings", watching: "AgentSettings") -> None:
    if serving.dashboard_enabled:
        report(f"Dashboard:  http://localhost:{serving.dashboard_port}")
    report(f"API:        {watching.urls[0]}{serving.api_path}")
    report(f"Health:     http://localhost:{serving.health_port}/health/ready")
    report(f"Watching this machine as {watching.client_id}; Ctrl-C ends.")
