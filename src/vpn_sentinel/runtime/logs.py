"""Logging: one line an event, `key=value` pairs after a short sentence, control characters escaped."""

import contextlib
import errno
import logging
import os
import sys
import time
from io import TextIOWrapper
from typing import Final

from vpn_sentinel.runtime.user_error import UserError

STANDARD_FIELDS: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class LineFormatter(logging.Formatter):
    """`2026-01-02T03:04:05Z INFO uplink connected url=https://… agent=nl-1`: the items of `extra=` become pairs."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        when = self.formatTime(record, "%Y-%m-%dT%H:%M:%SZ")
        name = record.name.removeprefix("vpn_sentinel.")
        pairs = "".join(
            f" {key}={_quoted(value)}" for key, value in record.__dict__.items() if key not in STANDARD_FIELDS
        )
        line = f"{when} {record.levelname} {name} {_clean(record.getMessage())}{pairs}"
        if record.exc_info:
            # The text of an exception may come from outside: indented and escaped, it cannot look like a log line.
            trace = self.formatException(record.exc_info).split("\n")
            line += "".join(f"\n  {_clean(part)}" for part in trace)
        return line


class _LogFile(logging.FileHandler):
    """Reports a log that cannot be written (a full disk) once, in one line, until it can be written again.

    The log names addresses and tunnels: a new file is readable by its owner only. An existing one keeps its mode.
    """

    _failed = _is_reported = False

    def _open(self) -> TextIOWrapper:
        # Do not wait for a reader of a pipe; without one, opening fails (ENXIO, fifo(7)).
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "a", encoding=self.encoding, errors=self.errors)

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        super().emit(record)
        self._is_reported = self._failed

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._failed = True
        if not self._is_reported:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"vpn-sentinel: the log cannot be written: {error.strerror}\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # buffered data that could not be written before either
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
    # These log each request with its URL; a Bot API URL holds the token.
    for noisy in ("httpx", "httpcore", "uvicorn.access", "uvicorn.error", "websockets", "asyncio", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _quoted(value: object) -> str:
    text = str(value)
    if text and not any(c in ' "=' for c in text):
        return _clean(text)
    # Escaped, so that no value can look like another pair.
    return '"' + _clean(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'
