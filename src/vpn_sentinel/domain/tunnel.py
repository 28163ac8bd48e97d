"""The names of tunnels and sites."""

import re
from typing import Final

MAX_NAME_LENGTH: Final = 100  # as in the replaced system
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", re.ASCII)


def tunnel_name(text: str) -> str:
    """Return `text` when it is a valid tunnel name. Raises ValueError that says what is valid."""
    if len(text) > MAX_NAME_LENGTH:
        msg = f"a name takes at most {MAX_NAME_LENGTH} characters, this one has {len(text)}"
        raise ValueError(msg)
    if not _NAME.fullmatch(text):
        msg = "a name takes letters, digits, '.', '_' and '-', and starts with no '.'"
        raise ValueError(msg)
    return text


def site_name(text: str) -> str:
    """Return `text` when it is a valid site name: as a tunnel's, or "" for none. Raises ValueError."""
    return tunnel_name(text) if text else text
