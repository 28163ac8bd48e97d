"""What the agent may do about a leak or a dead tunnel: read once, all of it off unless somebody asks for it."""

import os
import shlex
import stat
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.containment.containment import Mode
from vpn_sentinel.agent.remedies.hook import who_else_may_write
from vpn_sentinel.runtime import settings as s
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import SettingError, Source

_NONE: Final[tuple[str, ...]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReactionSettings:
    """`hook` is a command and its arguments. `after` is seconds, None for each remedy's own; `cap` is times an hour."""

    contain: Mode
    hook: tuple[str, ...]
    hook_timeout: float
    gluetun_restart: bool
    qbittorrent_url: str | None
    qbittorrent_user: str
    qbittorrent_password: Secret
    transmission_url: str | None
    transmission_user: str
    transmission_password: Secret
    resume: bool
    after: float | None
    cap: int
    dry_run: bool

    @property
    def wants_remedies(self) -> bool:
        """Whether anything but containment is to be done."""
        return bool(self.hook or self.gluetun_restart or self.qbittorrent_url or self.transmission_url)

    @classmethod
    def read(cls, source: Source) -> "ReactionSettings":
        """Raises SettingError naming the setting that cannot be used."""
        url = source.get("QBITTORRENT_URL", _client, None)
        user = source.get("QBITTORRENT_USER", s.text, "")
        password = source.get("QBITTORRENT_PASSWORD", s.secret, Secret(""))
        if bool(user) is not bool(password):
            raise SettingError("VPN_SENTINEL_QBITTORRENT_USER", "takes VPN_SENTINEL_QBITTORRENT_PASSWORD beside it")
        return cls(
            contain=source.get("CONTAIN", _mode, Mode.OFF),
            hook=source.get("HOOK", _command, _NONE),
            hook_timeout=source.get("HOOK_TIMEOUT", s.number(1, 300, "seconds"), 10.0),
            gluetun_restart=source.get("REMEDY_GLUETUN_RESTART", s.boolean, False),
            qbittorrent_url=url,
            qbittorrent_user=user,
            qbittorrent_password=password,
            transmission_url=source.get("TRANSMISSION_URL", _client, None),
            transmission_user=source.get("TRANSMISSION_USER", _basic_user, ""),
            transmission_password=source.get("TRANSMISSION_PASSWORD", s.secret, Secret("")),
            resume=source.get("REMEDY_RESUME", s.boolean, False),
            after=source.get("REMEDY_AFTER", s.number(0, 3600, "seconds"), None),
            cap=source.get("REMEDY_CAP", s.integer(1, 60), 3),
            dry_run=source.get("REMEDY_DRY_RUN", s.boolean, False),
        )


def _mode(value: str) -> Mode:
    return Mode(s.one_of(*Mode)(value))


def _command(value: str) -> tuple[str, ...]:
    """A command line taken apart as a shell would, without a shell. Raises ValueError."""
    found = tuple(shlex.split(value))
    if len(found) == 1 and not s.mode_of(found[0]):  # all of it in quotes, as an env file hands it over
        found = tuple(shlex.split(found[0]))
    if not found or not found[0].startswith("/"):
        msg = "takes a command with its whole path, such as /usr/local/bin/on-change --quiet"
        raise ValueError(msg)
    if not stat.S_ISREG(s.mode_of(found[0])) or not os.access(found[0], os.X_OK):
        msg = f"{found[0]} is missing or cannot be run"
        raise ValueError(msg)
    try:
        others = who_else_may_write(found)
    except OSError as e:
        msg = f"{e.filename}: {e.strerror}"
        raise ValueError(msg) from e
    if others is not None:
        msg = f"{others}: the command and every folder above must be root's or the agent's, and writable by nobody else"
        raise ValueError(msg)
    return found


def _client(value: str) -> str:
    return s.url(value, login="takes no login: its _USER and _PASSWORD are settings of their own")


def _basic_user(value: str) -> str:
    """A user of HTTP's basic authentication (RFC 7617)."""
    if ":" in value:
        msg = "takes a user without a colon"
        raise ValueError(msg)
    return value
