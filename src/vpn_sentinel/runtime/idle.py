"""Settings that do nothing as the others stand: the one table, of all roles. They are told at the start, and no error.

Settings are named without their prefix, as `Source` takes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.runtime.settings import PREFIX, UNPREFIXED, Source

_OFF: Final = frozenset({"", "false", "no", "off", "0"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """`names` do nothing unless one of `needs` is set, or while `beside` is set and `spoils` says so of its value."""

    names: tuple[str, ...]
    needs: tuple[str, ...] = ()
    beside: str = ""
    spoils: Callable[[str], bool] = lambda _: False


def _is_off(value: str) -> bool:
    return value.lower() in _OFF


def _is_reference(value: str) -> bool:
    return value.lower() == "reference"


def _is_postgres(value: str) -> bool:
    return value.startswith("postgres")


_REMEDIES: Final = ("HOOK", "REMEDY_GLUETUN_RESTART", "QBITTORRENT_URL", "TRANSMISSION_URL")

SERVER: Final = (
    Idle(names=("WEBHOOK_SECRET", "WEBHOOK_ALLOW_PRIVATE"), needs=("WEBHOOK_URL",)),
    Idle(names=("TELEGRAM_API_URL",), needs=("TELEGRAM_BOT_TOKEN",)),
    Idle(names=("CANARY_HOST", "CANARY_PORT", "CANARY_NS", "CANARY_ADDRESSES"), needs=("CANARY_ZONE",)),
    Idle(names=("DASHBOARD_PUBLIC", "SERVER_DASHBOARD_PORT"), beside="SERVER_WEB_DASHBOARD_ENABLED", spoils=_is_off),
    Idle(names=("DASHBOARD_PUBLIC", "SERVER_DASHBOARD_PORT"), beside="SERVER_DASHBOARD_ENABLED", spoils=_is_off),
    # The folder is used by `db backup` all the same.
    Idle(names=("BACKUP_KEEP",), beside="BACKUP_HOURS", spoils=lambda value: not float(value)),
    Idle(names=("BACKUP_DIR", "BACKUP_HOURS", "BACKUP_KEEP"), beside="DATABASE_URL", spoils=_is_postgres),
)
AGENT: Final = (
    Idle(names=("GLUETUN_API_KEY", "GLUETUN_USER"), needs=("GLUETUN_URL", "REMEDY_GLUETUN_RESTART")),
    Idle(names=("OPENVPN_MANAGEMENT_PASSWORD",), needs=("OPENVPN_MANAGEMENT",)),
    Idle(names=("QBITTORRENT_USER",), needs=("QBITTORRENT_URL",)),
    Idle(names=("TRANSMISSION_USER", "TRANSMISSION_PASSWORD"), needs=("TRANSMISSION_URL",)),
    Idle(names=("TRANSMISSION_PASSWORD",), needs=("TRANSMISSION_USER",)),
    Idle(names=("HOOK_TIMEOUT",), needs=("HOOK",)),
    Idle(names=("REMEDY_RESUME",), needs=("QBITTORRENT_URL", "TRANSMISSION_URL")),
    Idle(names=("REMEDY_AFTER", "REMEDY_CAP", "REMEDY_DRY_RUN"), needs=_REMEDIES),
    Idle(
        names=(
            *("CONTAIN", *_REMEDIES, "GLUETUN_URL", "OPENVPN_MANAGEMENT", "FORWARDED_PORT"),
            *("TUNNEL_INTERFACE", "TUNNEL_ENDPOINTS", "MEANT_OUTSIDE"),
        ),
        beside="ROLE",
        spoils=_is_reference,
    ),
)
GEO: Final = (Idle(names=("MAXMIND_URL",), needs=("MAXMIND_KEY",)),)


def idle(source: Source, *rows: Idle) -> tuple[str, ...]:
    """A line for each setting that does nothing as the others stand. All have been read before, so they can be."""
    return tuple(dict.fromkeys(line for row in rows for line in _lines(source, row)))


def _lines(source: Source, row: Idle) -> list[str]:
    set_ = [name for name in row.names if _is_set(source, name)]
    if not set_ or any(_is_set(source, name) for name in row.needs):
        return []
    if row.needs:
        why = f"without {' or '.join(_key(name) for name in row.needs)}"
    else:
        value = source.raw(row.beside)
        if value is None or not row.spoils(value):
            return []
        why = f"beside {_key(row.beside)}={'postgresql://…' if _is_postgres(value) else value}"
    return [f"{_key(name)}: does nothing {why}" for name in set_]


def _is_set(source: Source, name: str) -> bool:
    return not _is_off(source.raw(name) or "")


def _key(name: str) -> str:
    return name if name in UNPREFIXED else PREFIX + name
