"""The packet sockets of the leak watch: on each interface one for what leaves, and one for what comes in."""

import errno
import logging
import socket
from collections.abc import Callable, Iterable
from typing import Final

from vpn_sentinel.agent.leakwatch import bpf
from vpn_sentinel.agent.leakwatch.rules import Rules
from vpn_sentinel.agent.leakwatch.tap import Tap

log = logging.getLogger(__name__)

UNREAD_S: Final = 10.0  # after something that came in was left unread, in which nobody is said not to have come
_GONE: Final = frozenset({errno.ENODEV, errno.ENXIO})
# Gets the interface's name, the ethertype, the packet, and when it passed: see `tap`.
OnPacket = Callable[[str, int, bytes, float], None]
OnMissed = Callable[[int], None]


class Taps:
    """Interfaces are known by their index.

    `permitted` is whether packet sockets may be opened here, None before that was tried; `unwatched` says why an
    interface that should be watched is not.
    """

    def __init__(self, left: OnPacket, missed: OnMissed, came_in: OnPacket, now: Callable[[], float]) -> None:
        """`left` and `missed` hear of what leaves, `came_in` of what comes in; `now` is a clock that never jumps."""
        self._left, self._missed = left, missed
        self._came_in, self._now = came_in, now
        self._unread = float("-inf")  # when something that came in was left unread
        self._outbound: dict[int, Tap] = {}
        self._inbound: dict[int, Tap] = {}
        self.permitted: bool | None = None
        self.unwatched: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._outbound)

    def __contains__(self, index: int) -> bool:
        return index in self._outbound

    @property
    def floods_out(self) -> bool:
        """Whether some of what leaves is left unread just now."""
        return any(tap.rests for tap in self._outbound.values())

    def has_read_all(self) -> bool:
        """Whether all that came in lately was read."""
        floods = any(tap.rests for tap in self._inbound.values())
        return not floods and self._now() - self._unread > UNREAD_S

    def leave_unread(self) -> None:
        """Something that came in tells nothing: what belongs to it may be lost."""
        self._unread = self._now()

    def hears(self, index: int, name: str) -> bool:
        """Whether both sockets are there, and still of the interface of that name."""
        return index in self._outbound and self._outbound[index].hears(name) and self._inbound[index].hears(name)

    def open(self, index: int, name: str, rules: Rules) -> None:
        """Watch one more interface; `permitted` or `unwatched` tells where that cannot be."""
        inbound = None
        try:
            inbound = Tap(name, bpf.inbound(rules), self._came_in, self._missed_inbound)
            outbound = Tap(name, bpf.program(rules), self._left, self._missed)
        except PermissionError:
            self.permitted = False
            log.warning("packets cannot be watched here", extra={"remedy": "CAP_NET_RAW"})
            return
        except (OSError, ValueError) as e:
            # It went away, this process has no descriptor left, or the filter was refused.
            if inbound is not None:
                inbound.close()
            self.failed(index, name, e)
            return
        self.permitted = True
        if self.unwatched.pop(index, None) is not None:
            log.info("an interface is watched again", extra={"interface": name})
        self._outbound[index], self._inbound[index] = outbound, inbound

    def failed(self, index: int, name: str, error: Exception) -> None:
        """Say once why an interface is not watched; each look tries again."""
        if isinstance(error, OSError) and error.errno in _GONE and not _is_there(index):
            return  # it went away in this moment, and is not to be watched any more
        if self.unwatched.get(index) != str(error):
            log.warning("an interface cannot be watched", extra={"interface": name, "reason": str(error)})
        self.unwatched[index] = str(error)

    def keep_only(self, wanted: Iterable[int]) -> None:
        """Close the sockets of all other interfaces."""
        for index in set(self._outbound) - set(wanted):
            self._outbound.pop(index).close()
            self._inbound.pop(index).close()

    def filter_outbound(self, rules: Rules) -> None:
        """Raises OSError, or ValueError: then the old filter is there still."""
        made = bpf.program(rules)
        for tap in self._outbound.values():
            tap.filter(made)

    def filter_inbound(self, rules: Rules) -> None:
        """Raises OSError, or ValueError: then the old filter is there still."""
        made = bpf.inbound(rules)
        for tap in self._inbound.values():
            tap.filter(made)

    def _missed_inbound(self, packets: int) -> None:
        if packets:
            self.leave_unread()

    def read_inbound(self) -> None:
        """Read what came in and waits."""
        for tap in tuple(self._inbound.values()):
            tap.read()


def _is_there(index: int) -> bool:
    """Whether there is such an interface, whatever its name: one that cannot be printed cannot be asked for here."""
    try:
        socket.if_indextoname(index)
    except OSError:
        return False
    return True
