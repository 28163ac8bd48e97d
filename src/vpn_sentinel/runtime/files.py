"""Files that are there whole or not at all, whenever the process is killed, the disk full or the power gone."""

import errno
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Final

PART: Final = ".part"  # how the name of a file ends that is not whole yet
_LEFT: Final = re.compile(r"\.[0-9a-f]{16}" + re.escape(PART))


def put(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write `content` to `path`: afterwards, and after any failure, it holds either that or what it held before.

    Written beside it, under a name that nobody can have put a link at; a link at `path` is replaced, not followed. A
    process that is killed leaves a `*.part` at worst, see `sweep`. Raises OSError.
    """
    written = beside(path)
    handle = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(handle, mode)  # by the handle: whoever may write to the folder may exchange the name
        settle(written, path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def folder(path: Path, *, mode: int = 0o700) -> None:
    """Have a folder there, and those above it. Raises OSError; what else has its name is said."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=mode)
    except FileExistsError as e:
        what = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "no folder"
        raise NotADirectoryError(errno.ENOTDIR, f"is {what}", str(path)) from e


def try_folder(path: Path) -> None:
    """Have a folder there, and write a little file into it that vanishes. Raises OSError.

    A full disk is let pass: it may have room again.
    """
    try:
        folder(path)
        with tempfile.TemporaryFile(dir=path, buffering=0) as probe:  # without a name, so that nothing is ever left
            probe.write(b"\0" * 4096)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def beside(path: Path) -> Path:
    """A new name in the same folder, for what is to take the place of `path`."""
    return path.with_name(f"{path.name[:100]}.{secrets.token_hex(8)}{PART}")


def sweep(folder: Path, name: str) -> None:
    """Remove what killed processes left of files in `folder` whose names begin with `name`.

    With it goes what SQLite kept beside one, a journal. Raises OSError.
    """
    for path in list(folder.iterdir()):
        if path.name.startswith(name) and _LEFT.search(path.name, len(name)):
            path.unlink(missing_ok=True)


def settle(written: Path, path: Path) -> None:
    """Give a file that is written its name, in one step that a loss of power does not undo (rename(2), fsync(2)).

    Raises OSError.
    """
    to_disk(written)
    written.replace(path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
