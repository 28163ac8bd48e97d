"""Settings of a command: its flags over the environment over a TOML file."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from vpn_sentinel.runtime.idle import Idle, idle
from vpn_sentinel.runtime.settings import Source, environment
from vpn_sentinel.runtime.timezone import is_understood

if TYPE_CHECKING:
    from vpn_sentinel.server.settings import ServerSettings

log = logging.getLogger(__name__)
T = TypeVar("T")


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="settings as a TOML file (environment and flags win)")


def source_of(args: argparse.Namespace) -> Source:
    """Flags whose `dest` is a setting's name (upper case) become its value. Raises SettingError."""
    flags = {name: value for name, value in vars(args).items() if name.isupper()}
    return Source.load(environment(), flags, getattr(args, "config", None))


def server_settings(args: argparse.Namespace, also: Callable[[Source], object] | None = None) -> "ServerSettings":
    """Read the server's settings and name those that nobody knows. Raises SettingError.

    `also` is given the source once it is read: for settings of what runs beside the server, or for more to be told.
    """
    from vpn_sentinel.server.settings import ServerSettings

    source = source_of(args)
    settings = ServerSettings.read(source)
    if also is not None:
        also(source)
    warn_unread(source)
    return settings


def warn_unread(source: Source) -> None:
    """A misspelt setting is told, not ignored. One environment file often serves agent and server, so what the other
    role reads is known too.
    """
    for name in unread(source):
        print(f"vpn-sentinel: {name}: no such setting; is it misspelt?", file=sys.stderr)
    zone = source.raw("TZ")
    if zone and not is_understood(zone):
        print(f"vpn-sentinel: TZ: the system does not know {zone!r}: times are told in UTC", file=sys.stderr)


def warn_idle(source: Source, *rows: Idle) -> None:
    """What is set and does nothing as the other settings stand is told, for somebody counts on it."""
    for line in idle(source, *rows):
        print(f"vpn-sentinel: {line}", file=sys.stderr)


def unread(source: Source) -> list[str]:
    """Names that are set and that no role reads. The other roles' settings are read only where some are left."""
    if not source.unread():
        return []
    source.asked |= _names_of_every_role()
    return source.unread()


def _names_of_every_role() -> set[str]:
    from vpn_sentinel.agent.geo.settings import GeoSettings
    from vpn_sentinel.agent.settings import AgentSettings
    from vpn_sentinel.server.settings import ServerSettings

    plain = Source(env={"VPN_SENTINEL_URL": "http://127.0.0.1"})
    ServerSettings.read(plain)
    AgentSettings.read(plain)
    GeoSettings.read(plain)
    return plain.asked
