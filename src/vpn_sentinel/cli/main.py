"""`vpn-sentinel`: finds the command and runs it. Each command's module is imported only when it is asked for."""

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
FAILED: Final = 1
_FILES: Final = 32

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


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 64 for a call that makes no sense, 1 for a failure."""
    _open_closed_streams()
    _print_what_can_be_printed()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < _FILES:  # found out later it would be a traceback, or be blamed on what did not fit any more
        print(f"vpn-sentinel: only {files} open files are allowed (ulimit -n), {_FILES} are needed", file=sys.stderr)
        return FAILED
    try:
        status = _main(list(sys.argv[1:] if words is None else words))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130  # as a shell reports SIGINT
    except BrokenPipeError:
        _drop_output()
        return 141  # and SIGPIPE
    except (OSError, MemoryError, RuntimeError, ExceptionGroup) as e:
        lacking = _lacking(e)
        if not lacking:
            raise
        print(f"vpn-sentinel: {lacking}", file=sys.stderr)
        _drop_output()
        return FAILED
    return status


def _lacking(error: BaseException) -> str:
    """What this machine or its limits do not give, in a line; "" for any other error."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOSPC:
        # Where output goes to a file, or whatever else could not be written to the end.
        return f"{getattr(error, 'filename', None) or 'what is printed or kept'}: {os.strerror(errno.ENOSPC)}"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"too many open files: {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} are allowed (ulimit -n)"
    if number == errno.ENOMEM or isinstance(error, MemoryError):
        return "there is not enough memory, or more is not allowed (ulimit -v)"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "no thread can be started: more memory (ulimit -v) or more processes (ulimit -u) are not allowed"
    return ""


def _main(words: list[str]) -> int:
    parser = _Parser(prog="vpn-sentinel", description="Watches VPN tunnels and notifies you when one leaks or fails.")
    parser.add_argument("--version", action="version", version=f"vpn-sentinel {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((w for w in words if not w.startswith("-")), None)
    for name, (purpose, module) in COMMANDS.items():
        if name == wanted:
            import_module(f"vpn_sentinel.cli.{module}").add(commands)
        else:
            commands.add_parser(name, help=purpose, add_help=False)
    args = parser.parse_args(words)
    try:
        return int(args.func(args))
    except ModuleNotFoundError as e:
        if e.name is None or e.name.startswith("vpn_sentinel"):
            raise
        print(f"vpn-sentinel: {args.command} needs the server's packages ({e.name} is missing)", file=sys.stderr)
        return FAILED
    except UserError as e:
        print(f"vpn-sentinel: {e}", file=sys.stderr)
        return FAILED


def _open_closed_streams() -> None:
    """Open what is closed of standard input, output and error (`<&-`, some supervisors).

    The next file or socket would take the number, and lines for people would be written into it (POSIX, open()).
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _print_what_can_be_printed() -> None:
    """Put a "?" for what the output's encoding lacks: its error would look like the exit status of a verdict."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _drop_output() -> None:
    """Send what is still in the buffer nowhere, so that the interpreter's end does not fail on it again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError):  # no descriptor: an output of somebody's who calls `main`
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def run() -> None:
    """The console script's entry."""
    sys.exit(main())
