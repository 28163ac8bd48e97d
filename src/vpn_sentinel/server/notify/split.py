"""Splits a long text into messages that Telegram accepts.

The Bot API allows 4,096 UTF-16 code units *after* it has parsed the entities. The count before parsing is never less,
so a text that fits here fits there.
"""

import re
from collections.abc import Iterator
from typing import Final

MESSAGE_UNITS: Final = 4096
# A tag or a character reference must not be cut; everything else may be, between two characters.
_ATOM: Final = re.compile(r"<[^<>]{0,40}>|&[a-z0-9#]{1,8};|.", re.DOTALL)


def utf16(text: str) -> int:
    """Length in UTF-16 code units: two for a character outside the basic plane, such as most emoji."""
    return len(text) + sum(c > "\uffff" for c in text)


def split(text: str, limit: int = MESSAGE_UNITS) -> list[str]:
    """Split `text` at line breaks into parts of at most `limit` (at least 50) code units; none is empty or blank.

    A line that is longer than a message is split, but never inside a tag or a character reference.
    """
    parts: list[str] = []
    part, size = "", 0
    for line in text.split("\n"):
        for segment in _segments(line, limit):
            grown = size + 1 + utf16(segment)
            if part and grown > limit:
                parts.append(part)
                part, size = segment, utf16(segment)
            else:
                part, size = (f"{part}\n{segment}", grown) if part else (segment, utf16(segment))
    parts.append(part)
    return [p for p in parts if p.strip()]


def _segments(line: str, limit: int) -> Iterator[str]:
    if utf16(line) <= limit:
        yield line
        return
    segment, size = "", 0
    for atom in _ATOM.findall(line):
        if size + utf16(atom) > limit:
            yield segment
            segment, size = "", 0
        segment, size = segment + atom, size + utf16(atom)
    yield segment
