"""What this host lacks to ask or to take anything: descriptors, memory, room in a queue. It says nothing of the tunnel.

A question that could not be asked is unknown: read as "no answer" it would be a dead tunnel, or DNS that is down. A
connection that could not be taken is said, in one line and not in one for each.
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
_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN})
_SAYS_EVERY: Final = 60.0  # seconds


def is_shortage(error: BaseException | None) -> bool:
    """Whether an error is of this kind."""
    return isinstance(error, OSError) and error.errno in _SHORT


def out_of_descriptors() -> bool:
    """Whether nothing can be opened now, for callers whose errors do not tell (getaddrinfo(3) says EAI_AGAIN)."""
    try:
        os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError as e:
        return is_shortage(e)
    return False


class Untaken:
    """Notes that connections cannot be taken. It is said when that begins, and once a minute while it lasts."""

    def __init__(self, boottime: Callable[[], float]) -> None:
        """`boottime` is a clock in seconds that never jumps."""
        self._boottime = boottime
        self._said_at = -inf
        self._unsaid = 0

    def note(self, reason: str) -> None:
        self._unsaid += 1
        now = self._boottime()
        if now - self._said_at >= _SAYS_EVERY:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            facts = {"reason": reason, "open_files_at_most": limit, "times": self._unsaid}
            log.error("new connections cannot be taken", extra=facts)
            self._said_at, self._unsaid = now, 0

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """For `set_exception_handler`: asyncio's own loop tells of each connection that it could not take."""
        error = context.get("exception")
        if "socket" in context and isinstance(error, OSError) and is_shortage(error):
            self.note(os.strerror(error.errno or 0))
        else:
            loop.default_exception_handler(context)
