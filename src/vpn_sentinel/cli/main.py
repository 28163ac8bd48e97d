"""`vpn-sentinel`: find the command and run it. A command's module is imported only when the command is used."""

import argparse
import contextlib
import errno
import io
import os
import resource
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from vpn_sentinel import __version__
from vpn_sentinel.runtime.user_error import UserError

USAGE: Final = 64  # EX_USAGE of sysexits(3)
FAILURE: Final = 1
_MIN_OPEN_FILES: Final = 32

# Command -> what it is for, its module under `cli`.
COMMANDS: Final = {
    "check": ("check this machine once, without a server", "check"),
    "up": ("run server and agent together on this machine", "up"),
    "agent": ("watch the tunnel of this network namespace and report", "agent"),
    "server": ("receive and judge reports, keep the history, notify", "server"),
    "token": ("create, list and revoke agents' credentials", "token"),
    "tunnel": ("list and show the watched tunnels", "tunnel"),
    "notify": ("send a test message", "notify"),
    "geo": ("download and show the offline databases of places", "geo"),
    "doctor": ("explain what can and cannot be seen from here, and how to fix it", "doctor"),
    "release": ("open what containment closed in this network namespace", "release"),
    "db": ("migrate, check, back up or restore the database", "db"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(USAGE, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 64 for wrong usage, 1 for a failure."""
    _open_closed_streams()
    _replace_unprintable()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < _MIN_OPEN_FILES:  # else it fails later with a traceback or a misleading error
        print(
            f"vpn-sentinel: only {files} open files are allowed (ulimit -n), {_MIN_OPEN_FILES} are needed",
            file=sys.stderr,
        )
        return FAILURE
    try:
        status = _main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130  # as a shell reports SIGINT
    except BrokenPipeError:
        _drop_output()
        return 141  # as a shell reports SIGPIPE
    except (OSError, MemoryError, RuntimeError, ExceptionGroup) as e:
        lacking = _shortage_of(e)
        if not lacking:
            raise
        print(f"vpn-sentinel: {lacking}", file=sys.stderr)
        _drop_output()
        return FAILURE
    return status


def _shortage_of(error: BaseException) -> str:
    """The resource that this machine or its limits lack, in one line; "" for any other error."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOSPC:
        # Where output goes to a file, or another file could not be written completely.
        return f"{getattr(error, 'filename', None) or 'what is printed or kept'}: {os.strerror(errno.ENOSPC)}"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"too many open files: {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} are allowed (ulimit -n)"
    if number == errno.ENOMEM or isinstance(error, MemoryError):
        return "there is not enough memory, or more is not allowed (ulimit -v)"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "no thread can be started: more memory (ulimit -v) or more processes (ulimit -u) are not allowed"
    return ""


def _main(arguments: list[str]) -> int:
    parser = _Parser(prog="vpn-sentinel", description="Watches VPN tunnels and notifies you when one leaks or fails.")
    parser.add_argument("--version", action="version", version=f"vpn-sentinel {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((w for w in arguments if not w.startswith("-")), None)
    for name, (purpose, module) in COMMANDS.items():
        if name == wanted:
            import_module(f"vpn_sentinel.cli.{module}").add(commands)
        else:
            commands.add_parser(name, help=purpose, add_help=False)
    args = parser.parse_args(arguments)
    try:
        return int(args.func(args))
    except ModuleNotFoundError as e:
        if e.name is None or e.name.startswith("vpn_sentinel"):
            raise
        print(f"vpn-sentinel: {args.command} needs the server's packages ({e.name} is missing)", file=sys.stderr)
        return FAILURE
    except UserError as e:
        print(f"vpn-sentinel: {e}", file=sys.stderr)
        return FAILURE


def _open_closed_streams() -> None:
    """Open standard input, output and error where they are closed (`<&-`, some supervisors).

    Else the next file or socket would get the number, and output for people would be written into it (POSIX, open()).
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _replace_unprintable() -> None:
    """Print "?" for what the output's encoding lacks: the error's exit status would look like a verdict's."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _drop_output() -> None:
    """Discard the output buffer, so that the interpreter does not fail on it again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError):  # no descriptor: a caller of `main` replaced standard output
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def run() -> None:
    """The console script's entry."""
    sys.exit(main())
