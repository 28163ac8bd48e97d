"""`TZ`, a variable of the system: taken as the system takes it (tzset(3)). What it cannot read means UTC there."""

import re
from pathlib import Path
from typing import Final

_ZONES: Final = Path("/usr/share/zoneinfo")
# POSIX: a name, how far west of Greenwich, and perhaps summer time with its rules.
_POSIX: Final = re.compile(r"(?:[A-Za-z]{3,}|<[A-Za-z0-9+-]{3,}>)[+-]?\d{1,2}(?::\d{2}){0,2}(?:[A-Za-z<].*)?", re.ASCII)


def is_understood(value: str, folder: Path = _ZONES) -> bool:
    """Whether the C library makes of `value` what its owner means, and not UTC for want of understanding it.

    Empty, and names of UTC, mean UTC. Never raises.
    """
    name = value.removeprefix(":")
    if not name or name.upper() in ("UTC", "GMT", "UCT", "ZULU", "UNIVERSAL", "ETC/UTC") or _POSIX.fullmatch(name):
        return True
    try:
        with (folder / name).open("rb") as file:  # an absolute path replaces the folder
            return file.read(4) == b"TZif"  # tzfile(5)
    except (OSError, ValueError):
        return False
