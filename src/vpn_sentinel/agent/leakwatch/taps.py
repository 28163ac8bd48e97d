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

UNREAD_DOUBT_S: Final = 10.0  # after incoming packets were lost, no flow is said to lack a first packet for so long
_GONE: Final = frozenset({errno.ENODEV, errno.ENXIO})
# Gets the interface's name, the ethertype, the packet, and when it passed: see `tap.Tap`.
OnPacket = Callable[[str, int, bytes, float], None]
OnMissed = Callable[[int], None]


class Taps:
    """Interfaces are keyed by their index.

    `permitted`: whether packet sockets may be opened here, None before the first try. `unwatched` gives the reason for
    each interface that should be watched and is not.
    """

    def __init__(self, left: OnPacket, missed: OnMissed, came_in: OnPacket, now: Callable[[], float]) -> None:
        """`left` and `missed` get what leaves, `came_in` what comes in; `now` is a monotonic clock in seconds."""
        self._left, self._missed = left, missed
        self._came_in, self._now = came_in, now
        self._unread_at = float("-inf")  # when incoming packets were last lost
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
        """Whether outgoing packets are left unread at the moment."""
        return any(tap.is_paused for tap in self._outbound.values())

    def has_read_all(self) -> bool:
        """Whether all incoming packets of the last seconds were read."""
        floods = any(tap.is_paused for tap in self._inbound.values())
        return not floods and self._now() - self._unread_at > UNREAD_DOUBT_S

    def note_unread(self) -> None:
        """Note that incoming packets may be lost."""
        self._unread_at = self._now()

    def is_bound_to(self, index: int, name: str) -> bool:
        """Whether both sockets exist and are still bound to the interface of that name."""
        taps = [taps[index] for taps in (self._outbound, self._inbound) if index in taps]
        return bool(taps) and all(tap.is_bound_to(name) for tap in taps)

    def open(self, index: int, name: str, rules: Rules) -> None:
        """Watch one more interface; a failure is noted in `permitted` or `unwatched`."""
        inbound = None
        try:
            inbound = Tap(name, bpf.inbound(rules), self._came_in, self._missed_inbound)
            outbound = Tap(name, bpf.program(rules), self._left, self._missed)
        except PermissionError:
            self.permitted = False
            log.warning("packets cannot be watched here", extra={"remedy": "CAP_NET_RAW"})
            return
        except (OSError, ValueError) as e:
            # The interface is gone, this process has no file descriptor left, or the filter was refused.
            if inbound is not None:
                inbound.close()
            self.failed(index, name, e)
            return
        self.permitted = True
        if self.unwatched.pop(index, None) is not None:
            log.info("an interface is watched again", extra={"interface": name})
        self._outbound[index], self._inbound[index] = outbound, inbound

    def failed(self, index: int, name: str, error: Exception) -> None:
        """Note, and log once, why an interface is not watched; each update tries again."""
        if isinstance(error, OSError) and error.errno in _GONE and not _is_there(index):
            return  # it was removed at this moment
        if self.unwatched.get(index) != str(error):
            log.warning("an interface cannot be watched", extra={"interface": name, "reason": str(error)})
        self.unwatched[index] = str(error)

    def keep_only(self, wanted: Iterable[int]) -> None:
        """Close the sockets of all other interfaces."""
        for index in set(self._outbound) - set(wanted):
            self._outbound.pop(index).close()
            self._inbound.pop(index).close()

    def filter_outbound(self, rules: Rules) -> None:
        """Raises OSError or ValueError; the old filter stays then."""
        insns = bpf.program(rules)
        for tap in self._outbound.values():
            tap.filter(insns)

    def filter_inbound(self, rules: Rules) -> None:
        """Raises OSError or ValueError; the old filter stays then."""
        insns = bpf.inbound(rules)
        for tap in self._inbound.values():
            tap.filter(insns)

    def _missed_inbound(self, packets: int) -> None:
        if packets:
            self.note_unread()

    def read_inbound(self) -> None:
        """Read the incoming packets that wait."""
        for tap in tuple(self._inbound.values()):
            tap.read()


def _is_there(index: int) -> bool:
    """Whether the interface exists. Asked by index, since Python cannot ask for a name that is not UTF-8."""
    try:
        socket.if_indextoname(index)
    except OSError:
        return False
    return True
