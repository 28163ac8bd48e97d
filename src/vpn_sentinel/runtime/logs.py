"""Logging: one line an event, `key=value` pairs behind a short sentence, control characters escaped."""

import contextlib
import errno
import logging
import os
import sys
import time
from io import TextIOWrapper
from typing import Final

from vpn_sentinel.runtime.user_error import UserError

PLAIN: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class LineFormatter(logging.Formatter):
    """`2026-01-02T03:04:05Z INFO uplink connected url=https://… agent=nl-1`: what stands in `extra=` becomes pairs."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        when = self.formatTime(record, "%Y-%m-%dT%H:%M:%SZ")
        name = record.name.removeprefix("vpn_sentinel.")
        pairs = "".join(f" {key}={_quoted(value)}" for key, value in record.__dict__.items() if key not in PLAIN)
        line = f"{when} {record.levelname} {name} {_clean(record.getMessage())}{pairs}"
        if record.exc_info:
            # The text of an exception may come from outside: indented and cleaned, it cannot pass for a line of ours.
            trace = self.formatException(record.exc_info).split("\n")
            line += "".join(f"\n  {_clean(part)}" for part in trace)
        return line


class _LogFile(logging.FileHandler):
    """A log that cannot be written (a full disk) is told once, in a line, until it can be again.

    It names addresses and tunnels: a file that is made here is for its owner's eyes. One that is there keeps its mode.
    """

    _failed = _told = False

    def _open(self) -> TextIOWrapper:
        # Not to wait for a reader of a pipe, which is an error then (ENXIO, fifo(7)).
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "a", encoding=self.encoding, errors=self.errors)

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        super().emit(record)
        self._told = self._failed

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._failed = True
        if not self._told:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"vpn-sentinel: the log cannot be written: {error.strerror}\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what could not be written before either
            super().close()


def open_log(*, debug: bool = False, quiet: bool = False, file: str | None = None) -> None:
    """Send log lines to standard error, or to `file`; `quiet` leaves warnings and errors.

    Raises UserError when the file cannot be opened.
    """
    try:
        handler = _LogFile(file, encoding="utf-8") if file else logging.StreamHandler(sys.stderr)
    except OSError as e:
        why = "is a pipe that nobody reads, or a socket" if e.errno == errno.ENXIO else e.strerror
        msg = f"VPN_SENTINEL_LOG_FILE: {_clean(file or '')}: {why}"
        raise UserError(msg) from e
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    # These print a line, with its URL, for each request; a Bot API URL holds the token.
    for noisy in ("httpx", "httpcore", "uvicorn.access", "uvicorn.error", "websockets", "asyncio", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _quoted(value: object) -> str:
    text = str(value)
    if text and not any(c in ' "=' for c in text):
        return _clean(text)
    # Escaped, so that no value can pretend to be a further pair.
    return '"' + _clean(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'
