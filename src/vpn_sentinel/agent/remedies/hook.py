"""Run the owner's command when the state changes: JSON on its standard input, a time limit, no shell."""

import asyncio
import contextlib
import errno
import os
import re
import signal
import stat
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.remedies.failure import RemedyError

_INTERPRETER: Final = re.compile(r"((ba|da|a|k|mk|z)?sh|busybox|env|python[0-9.]*|perl|node)")
_MAX_LINKS: Final = 40  # Linux's limit (path_resolution(7))
MAX_OUTPUT_BYTES: Final = 4096  # of its output are kept for the log
_LATE_OUTPUT_S: Final = 0.5  # for output that is still in the pipe when the command has ended
_OWN_PREFIXES: Final = ("VPN_SENTINEL_", "TELEGRAM_")


def without_own_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without this project's settings, which hold keys, tokens and passwords."""
    return {name: value for name, value in environment.items() if not name.startswith(_OWN_PREFIXES)}


def who_else_can_write(command: Sequence[str]) -> str | None:
    """A sentence on how another user can change what `command` does; None where nobody else can.

    Checked are its program, the script that an interpreter is given, each folder above, and each link on the path: they
    must belong to root or to this process's user, and nobody else may write them, as sshd requires of its files
    (StrictModes in sshd_config(5)). In a folder with the sticky bit, others cannot replace files that are not theirs.
    Raises OSError.
    """
    files = [command[0]]
    if _INTERPRETER.fullmatch(Path(command[0]).name):
        # After `-c` there is a whole line, which begins with what it runs; a path may contain spaces.
        named = [file for word in command[1:] if word.startswith("/") for file in (word, word.split()[0])][:2]
        # Not Path.exists, which raises for a line that is too long for a file name.
        files += [file for file in named if os.path.exists(file)][:1]  # noqa: PTH110
    return next((found for file in files if (found := _other_writer(file)) is not None), None)


def _other_writer(file: str) -> str | None:
    parts = list(reversed(Path(file).parts))
    at, links = Path("/"), 0
    while parts:
        part = parts.pop()
        if part == "..":  # from a link's target; `at` itself is no link
            at = at.parent
            continue
        at /= part
        found = os.lstat(at)
        if found.st_uid not in (0, os.geteuid()):
            return f"{at} belongs to user {found.st_uid}"
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), file)
            parts += reversed(at.readlink().parts)
            at = at.parent
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (
            stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        ):
            return f"{at} can be written by {'everybody' if found.st_mode & stat.S_IWOTH else 'its group'}"
    return None


async def run_hook(command: Sequence[str], document: bytes, environment: Mapping[str, str], limit: float) -> str:
    """Run `command` in a process group of its own with `document` as input; returns the beginning of its output.

    After `limit` seconds the whole group is killed. Processes that a command leaves behind when it ends in time go on.
    Raises RemedyError, also where another user can write the command by now.
    """
    try:
        others = who_else_can_write(command)
    except OSError as e:
        raise RemedyError(f"cannot be started: {e.strerror}") from e
    if others is not None:
        raise RemedyError(f"is not run, for others may change it: {others}")
    output = bytearray()
    async with _pipe() as (reader, write_end):
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=write_end,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(environment),
                cwd="/",
                start_new_session=True,
            )
        except (OSError, ValueError) as e:
            raise RemedyError(f"cannot be started: {getattr(e, 'strerror', None) or e}") from e
        finally:
            os.close(write_end)
        try:
            async with asyncio.timeout(limit), asyncio.TaskGroup() as group:
                reading = group.create_task(_drain(reader, output))
                feeding = group.create_task(_feed(process.stdin, document))
                await process.wait()
                await asyncio.wait([reading], timeout=_LATE_OUTPUT_S)
                reading.cancel()
                feeding.cancel()
        except TimeoutError as e:
            raise RemedyError(f"took longer than {limit:g} s and was killed{_last_line(output)}") from e
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    if process.returncode != 0:
        raise RemedyError(f"ended with status {process.returncode}{_last_line(output)}")
    return _text(output)


@contextlib.asynccontextmanager
async def _pipe() -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
    """A pipe for output. Not asyncio's own: this one can be closed while another process still holds its other end."""
    read_end, write_end = os.pipe()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb", buffering=0)
    )
    try:
        yield reader, write_end
    finally:
        transport.close()


async def _drain(stream: asyncio.StreamReader, output: bytearray) -> None:
    """Keep the beginning, and read on to the end, so that the command never blocks on a full pipe."""
    while chunk := await stream.read(8192):
        output += chunk[: max(0, MAX_OUTPUT_BYTES - len(output))]


async def _feed(stream: asyncio.StreamWriter | None, document: bytes) -> None:
    if stream is None:
        return
    try:
        # A command need not read its input.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            stream.write(document)
            await stream.drain()
    finally:
        stream.close()


def _last_line(output: bytearray) -> str:
    text = _text(output)
    return f": {text.splitlines()[-1][:120]}" if text else ""


def _text(output: bytearray) -> str:
    kept = output.decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in kept)
