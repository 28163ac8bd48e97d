"""Sockets that belong to another user: where the tunnel is for one user alone, only these are routed into it.

The kernel gives a socket the file system user id of the thread that makes it (setfsuid(2); linux/net/socket.c,
sock_alloc), and rules by user match on that (ip-rule(8), uidrange). It is changed for that moment and for this thread
alone. It takes CAP_SETUID, as root has it.
"""

import codecs
import logging
import os
import socket
from collections.abc import Callable
from functools import cache
from typing import Final

log = logging.getLogger(__name__)

_INVALID_UID: Final = 2**32 - 1  # setfsuid(2) with it changes nothing, and returns the current id


@cache
def _setfsuid() -> Callable[[int], int]:
    """setfsuid(2). Loaded when it is needed: most agents do not need it, and ctypes costs a quarter of a megabyte."""
    import ctypes

    call = ctypes.CDLL(None).setfsuid
    call.argtypes, call.restype = (ctypes.c_uint32,), ctypes.c_uint32
    return call


class AsUser:
    """`uid` is the user that sockets are made for, None for this process's own. `refused`: that is not permitted."""

    def __init__(self) -> None:
        self.uid: int | None = None
        self.refused = False
        self._wanted: int | None = None

    def switch_to(self, uid: int | None) -> None:
        """Make sockets as `uid` from now on; where that is not permitted, log it once and set `refused`."""
        uid = None if uid == os.geteuid() else uid
        if uid == self._wanted:
            return
        self._wanted = self.uid = uid
        self.refused = False
        if uid is None:
            return
        codecs.lookup(
            "idna"
        )  # for host names: loaded at its first use, from files that the user may not be able to read
        with self:
            self.refused = _setfsuid()(_INVALID_UID) != uid
        if self.refused:
            self.uid = None
            log.warning(
                "only one user's programs go through the tunnel, and this process may not send probes as that user",
                extra={"uid": uid, "remedy": "run the agent as that user, or with CAP_SETUID"},
            )

    @property
    def refused_uid(self) -> int | None:
        """The user that sockets may not be made for, None if there is no such user."""
        return self._wanted if self.refused else None

    def __enter__(self) -> None:
        if self.uid is not None:
            _setfsuid()(self.uid)

    def __exit__(self, *_: object) -> None:
        if self.uid is not None:
            _setfsuid()(os.geteuid())

    def socket(self, family: int, kind: int) -> socket.socket:
        """A socket that belongs to that user. Raises OSError."""
        with self:
            return socket.socket(family, kind)


def socket_of(uid: int, family: int, kind: int, protocol: int = 0) -> socket.socket | None:
    """A socket of user `uid`, None without the permission to make one. Raises OSError."""
    if uid == os.geteuid():
        return socket.socket(family, kind, protocol)
    _setfsuid()(uid)
    try:
        return socket.socket(family, kind, protocol) if _setfsuid()(_INVALID_UID) == uid else None
    finally:
        _setfsuid()(os.geteuid())


AS_USER: Final = AsUser()
