"""Settings of a command: its flags win over the environment, and that over a TOML file."""

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from vpn_sentinel.runtime.idle import idle
from vpn_sentinel.runtime.settings import PREFIX, Setting, Source, environment, key_of
from vpn_sentinel.runtime.timezone import is_understood
from vpn_sentinel.wire.settings import TZ

if TYPE_CHECKING:
    from vpn_sentinel.server.settings import ServerSettings

_MIN_SIMILARITY: Final = 0.8  # 0 to 1: a name this similar is suggested for a misspelt one

# The modules that declare a command's settings. `up` reads those of agent and server, `doctor` those of agent and geo,
# and every command on the database those of server.
_DECLARING_MODULES: Final = {
    "agent": "vpn_sentinel.agent.settings",
    "check": "vpn_sentinel.agent.settings",
    "geo": "vpn_sentinel.agent.geo.settings",
    "server": "vpn_sentinel.server.settings",
}


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="settings as a TOML file (environment and flags win)")


def source_of(args: argparse.Namespace) -> Source:
    """Flags whose `dest` is a setting's name (upper case) become its value. Raises SettingError."""
    flags = {name: value for name, value in vars(args).items() if name.isupper()}
    return Source.load(environment(), flags, getattr(args, "config", None))


def settings_of(*readers: str) -> tuple[Setting[Any], ...]:
    """The settings that these commands read: agent, check, geo, server."""
    sections = [section for reader in readers for section in import_module(_DECLARING_MODULES[reader]).SECTIONS]
    settings = (s for section in sections for s in section.settings if not {*readers}.isdisjoint(s.read_by))
    return tuple(dict.fromkeys(settings))


def every_setting() -> tuple[Setting[Any], ...]:
    """All settings of all commands."""
    return settings_of(*_DECLARING_MODULES)


def server_settings(args: argparse.Namespace, also: Callable[[Source], object] | None = None) -> "ServerSettings":
    """Read the server's settings and warn of unknown ones. Raises SettingError.

    `also` gets the source after that: for settings of what runs with the server, or for more warnings.
    """
    from vpn_sentinel.server.settings import ServerSettings

    source = source_of(args)
    settings = ServerSettings.read(source)
    if also is not None:
        also(source)
    warn_unknown(source, "server")
    return settings


def warn_unknown(source: Source, *readers: str) -> None:
    """Warn of unknown settings, which are probably misspelt. One environment file often serves agent and server, so the
    other role's settings are known, too. `readers` are the commands that run.
    """
    for line in unknown(source, *readers):
        print(f"vpn-sentinel: {line}", file=sys.stderr)
    zone = source.get(TZ)
    if zone and not is_understood(zone):
        print(f"vpn-sentinel: TZ: the system does not know {zone!r}: times are shown in UTC", file=sys.stderr)


def warn_idle(source: Source, *readers: str) -> None:
    """Warn of settings that have no effect with the values of the others, since the user expects one."""
    for line in idle(source, settings_of(*readers)):
        print(f"vpn-sentinel: {line}", file=sys.stderr)


def unknown(source: Source, *readers: str) -> list[str]:
    """A line for each name that is set and that no command reads. The other roles' settings are imported only where
    names are left.
    """
    if not source.unknown(settings_of(*readers)):
        return []
    every = every_setting()
    return [_hint(name, every) for name in source.unknown(every)]


def _hint(name: str, every: tuple[Setting[Any], ...]) -> str:
    """The warning for an unknown `name`: one of the environment, or, in lower case, of the file."""
    from difflib import get_close_matches

    in_file = name.islower()
    bare = name.upper().removeprefix(PREFIX)
    if in_file and any(setting.name == bare and setting.env_only for setting in every):
        return f"{name}: can be set in the environment only"
    names = [known for setting in every for known in setting.names if not (in_file and setting.env_only)]
    near = get_close_matches(bare, names, n=1, cutoff=_MIN_SIMILARITY)
    if not near:
        return f"{name}: no such setting; is it misspelt?"
    return f"{name}: no such setting; is {near[0].lower() if in_file else key_of(near[0])} meant?"
