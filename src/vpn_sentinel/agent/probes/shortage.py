"""What this host lacks to ask anything: descriptors, memory, room in a queue. It says nothing of the tunnel.

A question that could not be asked is unknown: read as "no answer" it would be a dead tunnel, or DNS that is down.
"""

import errno
import os
from typing import Final

# Too many open files, here or on the whole host; no buffer, no memory, no free port: errno(3), connect(2).
_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN})


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
