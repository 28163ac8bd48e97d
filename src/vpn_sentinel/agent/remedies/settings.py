"""Settings of what the agent may do about a leak or a dead tunnel: read once, all off by default."""

import os
import shlex
import stat
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.containment.containment import Mode
from vpn_sentinel.agent.remedies.hook import who_else_can_write
from vpn_sentinel.agent.role import NOT_FOR_REFERENCE
from vpn_sentinel.runtime import parsers as p
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import Idle, Section, SettingError, Source, fill, key_of


def _mode(value: str) -> Mode:
    return Mode(p.one_of(*Mode)(value))


def _command(value: str) -> tuple[str, ...]:
    """A command line, split as a shell does, without a shell. Raises ValueError."""
    found = tuple(shlex.split(value))
    if len(found) == 1 and not p.mode_of(found[0]):  # all of it in quotes, as in an env file
        found = tuple(shlex.split(found[0]))
    if not found or not found[0].startswith("/"):
        msg = "needs a command with its full path, such as /usr/local/bin/on-change --quiet"
        raise ValueError(msg)
    if not stat.S_ISREG(p.mode_of(found[0])) or not os.access(found[0], os.X_OK):
        msg = f"{found[0]} is missing or cannot be run"
        raise ValueError(msg)
    try:
        others = who_else_can_write(found)
    except OSError as e:
        msg = f"{e.filename}: {e.strerror}"
        raise ValueError(msg) from e
    if others is not None:
        msg = f"{others}: the command and every folder above must be root's or the agent's, and writable by nobody else"
        raise ValueError(msg)
    return found


def _client(value: str) -> str:
    return p.url(value, login="takes no login: its _USER and _PASSWORD are settings of their own")


def _basic_user(value: str) -> str:
    """A user of HTTP's basic authentication (RFC 7617)."""
    if ":" in value:
        msg = "takes a user without a colon"
        raise ValueError(msg)
    return value


REACTIONS: Final = Section(
    "What the agent may do",
    "All of it is off by default. See [containment and remedies](../how-to/containment.md).\n",
    read_by=("agent",),
)
_ANY_REMEDY: Final = Idle(needs=("HOOK", "REMEDY_GLUETUN_RESTART", "QBITTORRENT_URL", "TRANSMISSION_URL"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReactionSettings:
    """`hook` is a command and its arguments. `after` is seconds, None for each remedy's own; `cap` is times an hour."""

    contain: Mode = REACTIONS.field(
        "CONTAIN",
        _mode,
        Mode.OFF,
        "`on` closes the ways out beside the tunnel when it leaks; `dry-run` only reports when it would",
        idle=(NOT_FOR_REFERENCE,),
    )
    hook: tuple[str, ...] = REACTIONS.field(
        "HOOK",
        _command,
        p.NO_TEXTS,
        "a command with its full path, and arguments, run when the verdict changes: `/usr/local/bin/on-change "
        "--quiet`. It and every folder above must belong to root or to the agent's user, and be writable by nobody "
        "else",
        idle=(NOT_FOR_REFERENCE,),
        verbatim=True,  # a command line contains quotes
    )
    hook_timeout: float = REACTIONS.field(
        "HOOK_TIMEOUT",
        p.number(1, 300, "seconds"),
        10.0,
        "seconds after which the command is killed, 1 to 300",
        idle=(Idle(needs=("HOOK",)),),
    )
    gluetun_restart: bool = REACTIONS.field(
        "REMEDY_GLUETUN_RESTART",
        p.boolean,
        False,
        "true restarts gluetun's VPN when the tunnel is down, through `VPN_SENTINEL_GLUETUN_URL` or, if that is not "
        "set, `http://127.0.0.1:8000`",
        idle=(NOT_FOR_REFERENCE,),
    )
    qbittorrent_url: str | None = REACTIONS.field(
        "QBITTORRENT_URL",
        _client,
        None,
        "qBittorrent's Web UI, such as `http://127.0.0.1:8080`: all torrents are paused at a leak",
        idle=(NOT_FOR_REFERENCE,),
    )
    qbittorrent_user: str = REACTIONS.field(
        "QBITTORRENT_USER",
        p.text,
        "",
        "qBittorrent's user; not needed where it trusts this address",
        pair="QBITTORRENT_PASSWORD",
        idle=(Idle(needs=("QBITTORRENT_URL",)),),
    )
    qbittorrent_password: Secret = REACTIONS.field(
        "QBITTORRENT_PASSWORD", p.secret, Secret(""), "the user's password", pair="QBITTORRENT_USER"
    )
    transmission_url: str | None = REACTIONS.field(
        "TRANSMISSION_URL",
        _client,
        None,
        "the same for Transmission, such as `http://127.0.0.1:9091`",
        idle=(NOT_FOR_REFERENCE,),
    )
    transmission_user: str = REACTIONS.field(
        "TRANSMISSION_USER", _basic_user, "", "Transmission's user", idle=(Idle(needs=("TRANSMISSION_URL",)),)
    )
    transmission_password: Secret = REACTIONS.field(
        "TRANSMISSION_PASSWORD",
        p.secret,
        Secret(""),
        "the user's password",
        idle=(Idle(needs=("TRANSMISSION_URL",)), Idle(needs=("TRANSMISSION_USER",))),
    )
    resume: bool = REACTIONS.field(
        "REMEDY_RESUME",
        p.boolean,
        False,
        "true resumes the torrents that the agent paused once the tunnel is protected again",
        idle=(Idle(needs=("QBITTORRENT_URL", "TRANSMISSION_URL")),),
    )
    after: float | None = REACTIONS.field(
        "REMEDY_AFTER",
        p.number(0, 3600, "seconds"),
        None,
        "seconds that trouble must last: 30 for a restart, 0 for a pause, the graces for the command",
        default_text="each remedy's own",
        idle=(_ANY_REMEDY,),
    )
    cap: int = REACTIONS.field(
        "REMEDY_CAP", p.integer(1, 60), 3, "times an hour that each remedy may run, 1 to 60", idle=(_ANY_REMEDY,)
    )
    dry_run: bool = REACTIONS.field(
        "REMEDY_DRY_RUN", p.boolean, False, "true only reports what would have been done", idle=(_ANY_REMEDY,)
    )

    @property
    def wants_remedies(self) -> bool:
        """Whether any remedy is switched on; containment is none."""
        return bool(self.hook or self.gluetun_restart or self.qbittorrent_url or self.transmission_url)

    @classmethod
    def read(cls, source: Source) -> "ReactionSettings":
        """Raises SettingError that names the setting that cannot be used."""
        settings = fill(cls, source)
        if bool(settings.qbittorrent_user) is not bool(settings.qbittorrent_password):
            raise SettingError(key_of("QBITTORRENT_USER"), f"needs {key_of('QBITTORRENT_PASSWORD')} as well")
        return settings
