"""The system's variable `TZ`: the C library takes a value that it cannot read for UTC (tzset(3))."""

import re
from pathlib import Path
from typing import Final

_ZONES: Final = Path("/usr/share/zoneinfo")
# POSIX: a name, the offset west of Greenwich, and optional daylight saving time with its rules.
_POSIX: Final = re.compile(r"(?:[A-Za-z]{3,}|<[A-Za-z0-9+-]{3,}>)[+-]?\d{1,2}(?::\d{2}){0,2}(?:[A-Za-z<].*)?", re.ASCII)


def is_understood(value: str, folder: Path = _ZONES) -> bool:
    """Whether the C library understands `value`, and does not fall back to UTC.

    An empty value and names of UTC mean UTC. Never raises.
    """
    name = value.removeprefix(":")
    if not name or name.upper() in ("UTC", "GMT", "UCT", "ZULU", "UNIVERSAL", "ETC/UTC") or _POSIX.fullmatch(name):
        return True
    try:
        with (folder / name).open("rb") as file:  # an absolute path replaces the folder
            return file.read(4) == b"TZif"  # tzfile(5)
    except (OSError, ValueError):
        return False
