"""Write files completely or not at all, even if the process is killed, the disk is full or the power fails."""

import errno
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Final

PARTIAL_SUFFIX: Final = ".part"  # of a file that is not complete yet
_PARTIAL_NAME: Final = re.compile(r"\.[0-9a-f]{16}" + re.escape(PARTIAL_SUFFIX))


def write_whole(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write `content` to `path`: after any failure it holds either that or its old content.

    It is written to a new file in the same folder first, whose name nobody can guess, so it is no link of another user;
    a link at `path` is replaced, not followed. A killed process leaves a `*.part` at worst: see `remove_partial`.
    Raises OSError.
    """
    temporary = temporary_path(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(descriptor, mode)  # by descriptor: others who may write to the folder could replace the name
        move_into_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def folder(path: Path, *, mode: int = 0o700) -> None:
    """Make a folder and its parents. Raises OSError, which says so if something else has that name."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=mode)
    except FileExistsError as e:
        what = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "no folder"
        raise NotADirectoryError(errno.ENOTDIR, f"is {what}", str(path)) from e


def try_folder(path: Path) -> None:
    """Make a folder, and test that a file can be written in it. Raises OSError.

    A full disk is no error here: it may have room again later.
    """
    try:
        folder(path)
        with tempfile.TemporaryFile(dir=path, buffering=0) as probe:  # has no name, so nothing can be left behind
            probe.write(b"\0" * 4096)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def temporary_path(path: Path) -> Path:
    """A new name in the same folder, for a file that will replace `path`."""
    return path.with_name(f"{path.name[:100]}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")


def remove_partial(folder: Path, name: str) -> None:
    """Remove the partial files that killed processes left in `folder`, of files whose names begin with `name`.

    SQLite's journals of such files are removed, too. Raises OSError.
    """
    for path in list(folder.iterdir()):
        if path.name.startswith(name) and _PARTIAL_NAME.search(path.name, len(name)):
            path.unlink(missing_ok=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Give a complete file its name, in one step that a power failure does not undo (rename(2), fsync(2)).

    Raises OSError.
    """
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
