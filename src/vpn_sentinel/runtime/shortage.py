"""Errors for want of resources on this host: file descriptors, memory, queues. They tell nothing about the tunnel.

A probe that failed by one is unknown: taken as "no answer" it would be a dead tunnel, or DNS that is down. Connections
that could not be accepted are logged together, in one line.
"""

import asyncio
import errno
import logging
import os
import resource
from collections.abc import Callable
from math import inf
from typing import Any, Final

log = logging.getLogger(__name__)

# Too many open files, here or on the whole host; no buffer, no memory, no free port: errno(3), connect(2), accept(2).
_SHORTAGE_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN})
_LOG_INTERVAL_S: Final = 60.0  # seconds


def is_shortage(error: BaseException | None) -> bool:
    """Whether an error is a shortage of resources."""
    return isinstance(error, OSError) and error.errno in _SHORTAGE_ERRNOS


def out_of_descriptors() -> bool:
    """Whether no file can be opened now, for callers whose errors hide it (getaddrinfo(3) returns EAI_AGAIN)."""
    try:
        os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError as e:
        return is_shortage(e)
    return False


class AcceptFailures:
    """Notes that connections cannot be accepted: logged when that begins, and once a minute while it lasts."""

    def __init__(self, boottime: Callable[[], float]) -> None:
        """`boottime` is a monotonic clock in seconds."""
        self._boottime = boottime
        self._logged_at = -inf
        self._unlogged = 0

    def note(self, reason: str) -> None:
        self._unlogged += 1
        now = self._boottime()
        if now - self._logged_at >= _LOG_INTERVAL_S:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            facts = {"reason": reason, "open_files_at_most": limit, "times": self._unlogged}
            log.error("new connections cannot be taken", extra=facts)
            self._logged_at, self._unlogged = now, 0

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """For `set_exception_handler`: asyncio's event loop calls it for each connection that it could not accept."""
        error = context.get("exception")
        if "socket" in context and isinstance(error, OSError) and is_shortage(error):
            self.note(os.strerror(error.errno or 0))
        else:
            loop.default_exception_handler(context)
