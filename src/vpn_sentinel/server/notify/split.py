"""Cutting a long text into messages that Telegram takes.

The Bot API counts 4,096 UTF-16 code units *after* it has parsed the entities. Counting them before is never less, so a
text that fits here fits there.
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
    """Cut `text` at line borders into parts of at most `limit` (at least 50) code units; none is empty or blank.

    A line that is longer than a whole message is cut inside, but never inside a tag or a character reference.
    """
    parts: list[str] = []
    part, size = "", 0
    for line in text.split("\n"):
        for piece in _pieces(line, limit):
            grown = size + 1 + utf16(piece)
            if part and grown > limit:
                parts.append(part)
                part, size = piece, utf16(piece)
            else:
                part, size = (f"{part}\n{piece}", grown) if part else (piece, utf16(piece))
    parts.append(part)
    return [p for p in parts if p.strip()]


def _pieces(line: str, limit: int) -> Iterator[str]:
    if utf16(line) <= limit:
        yield line
        return
    piece, size = "", 0
    for atom in _ATOM.findall(line):
        if size + utf16(atom) > limit:
            yield piece
            piece, size = "", 0
        piece, size = piece + atom, size + utf16(atom)
    yield piece
