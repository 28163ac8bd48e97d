"""Where a run keeps what it leaves."""

from itertools import count
from pathlib import Path


def unused(folder: Path) -> Path:
    """`folder`, or where something is in it already the first of `folder-2`, `folder-3` … that is free.

    A lab starts from an empty folder, and what an earlier run left is what one compares with.
    """
    candidates = (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in count(1))
    return next(c for c in candidates if not c.exists() or (c.is_dir() and not any(c.iterdir())))
