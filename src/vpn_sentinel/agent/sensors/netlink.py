"""The kernel's notifications: links, addresses, routes, nexthop objects and rules, the moment they change
(rtnetlink(7)).

Not all of them are changes. Router advertisements renew addresses every few seconds and Wi-Fi drivers repeat their
links; a repetition of the known state is ignored.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable
from typing import Final

from vpn_sentinel.agent.net.link import IFF_LOWER_UP, IFF_UP, Interface
from vpn_sentinel.agent.net.netlink import messages
from vpn_sentinel.agent.net.rtnetlink import (
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEXTHOP,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEXTHOP,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    follows_from_another_message,
    parse_address,
    parse_link,
)
from vpn_sentinel.domain.policy import IPAddress

log = logging.getLogger(__name__)

_RTMGRP_LINK, _RTMGRP_IPV4_IFADDR, _RTMGRP_IPV4_ROUTE, _RTMGRP_IPV4_RULE = 0x1, 0x10, 0x40, 0x80
_RTMGRP_IPV6_IFADDR, _RTMGRP_IPV6_ROUTE = 0x100, 0x400
_GROUPS: Final = (
    _RTMGRP_LINK
    | _RTMGRP_IPV4_IFADDR
    | _RTMGRP_IPV4_ROUTE
    | _RTMGRP_IPV4_RULE
    | _RTMGRP_IPV6_IFADDR
    | _RTMGRP_IPV6_ROUTE
)
_RTNLGRP_IPV6_RULE, _RTNLGRP_NEXTHOP = 19, 32  # beyond the 32 bits of bind(2): by membership
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
RETRY_S: Final = 1.0  # until a new socket is tried
DEBOUNCE_S: Final = 0.05  # one `ip link del` makes several messages
# Full tables take a while to read. To limit the CPU time under continuous changes, a call that took longer than
# `_FREE_CPU_S` is followed by a pause of `_REST_TIMES` the excess, up to `_MAX_REST_S`.
_FREE_CPU_S, _REST_TIMES, _MAX_REST_S = 0.1, 9, 10.0


class NetworkChanges:
    """Distinguishes changes from repetitions."""

    def __init__(self, interfaces: tuple[Interface, ...] = ()) -> None:
        self._links = {i.index: _state(i) for i in interfaces}
        self._addresses: set[tuple[int, IPAddress]] = {(i.index, a) for i in interfaces for a in i.addresses}
        self._complete = True

    def forget(self) -> None:
        """Messages were lost: the known state may be stale, and an apparent repetition may be a change."""
        self._links.clear()
        self._addresses.clear()
        self._complete = False

    def notice(self, data: bytes) -> bool:
        """Process one datagram; returns whether it has a change."""
        changes_seen = False
        for message in messages(data):  # all are processed, also after the first change
            changes_seen = self._is_new(message.type, message.body) or changes_seen
        return changes_seen

    def _is_new(self, message_type: int, body: bytes) -> bool:
        match message_type:
            case _ if message_type in (RTM_NEWLINK, RTM_DELLINK):
                return self._link(message_type, body)
            case _ if message_type in (RTM_NEWADDR, RTM_DELADDR):
                return self._address(message_type, body)
            case _ if message_type in (RTM_NEWROUTE, RTM_DELROUTE):
                return not follows_from_another_message(body)
            case _:
                return message_type in (RTM_NEWRULE, RTM_DELRULE, RTM_NEWNEXTHOP, RTM_DELNEXTHOP)

    def _link(self, message_type: int, body: bytes) -> bool:
        link = parse_link(body)
        if link is None:
            return False
        if message_type == RTM_DELLINK:
            return self._links.pop(link.index, None) is not None or not self._complete
        old, self._links[link.index] = self._links.get(link.index), _state(link)
        return old != _state(link)

    def _address(self, message_type: int, body: bytes) -> bool:
        address = parse_address(body)
        if address is None:
            return False
        known = address in self._addresses
        if message_type == RTM_DELADDR:
            self._addresses.discard(address)
            return known or not self._complete
        self._addresses.add(address)
        return not known


def _state(interface: Interface) -> tuple[str, int]:
    return interface.name, interface.flags & (IFF_UP | IFF_LOWER_UP)


class NetworkSensor:
    """Calls `changed` shortly after a change; several changes within that time are one call.

    The same applies to changes during the pause after a call that took long.
    """

    def __init__(
        self,
        changed: Callable[[], None],
        interfaces: tuple[Interface, ...] = (),
        sock: socket.socket | None = None,
        subscribe: Callable[[], socket.socket] | None = None,
    ) -> None:
        """`interfaces` is the known state; `sock` replaces the kernel. Raises OSError without netlink."""
        self._subscribe = subscribe or subscribed
        self._changed = changed
        self._changes = NetworkChanges(interfaces)
        self._sock = sock or self._subscribe()
        self._retry: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rested_until = 0.0  # loop time from which `changed` may be called again

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._sock, self._readable)

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock)
        for timer in (self._timer, self._retry):
            if timer is not None:
                timer.cancel()
        self._sock.close()

    def _readable(self) -> None:
        changes_seen = False
        while True:
            try:
                changes_seen = self._changes.notice(self._sock.recv(65536)) or changes_seen
            except BlockingIOError:
                break
            except OSError as e:
                changes_seen = True
                self._changes.forget()
                if e.errno != errno.ENOBUFS:  # ENOBUFS: the kernel dropped messages
                    self._renew(e)
                    break
        if changes_seen:
            self._schedule()

    def _schedule(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time() + DEBOUNCE_S, self._rested_until), self._notify)

    def _renew(self, error: OSError) -> None:
        """Replace a socket that failed with another error: it receives nothing, and would fail again at once."""
        log.warning("the netlink socket failed: subscribing again", extra={"reason": error.strerror})
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        self._open_again()

    def _open_again(self) -> None:
        self._retry = None
        try:
            self._sock = self._subscribe()
        except OSError:
            self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._open_again)
            return
        self.start()
        self._schedule()  # there may have been changes meanwhile

    def _notify(self) -> None:
        self._timer = None
        began = time.thread_time()  # CPU time of this thread: a busy machine does not extend the pause
        self._changed()
        took = time.thread_time() - began
        self._rested_until = asyncio.get_running_loop().time() + min(
            _REST_TIMES * max(0.0, took - _FREE_CPU_S), _MAX_REST_S
        )


def subscribed() -> socket.socket:
    """A netlink socket for notifications of links, addresses, routes, nexthop objects and rules. Raises OSError."""
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
    )
    try:
        sock.bind((0, _GROUPS))
    except OSError:
        sock.close()
        raise
    for group in (_RTNLGRP_IPV6_RULE, _RTNLGRP_NEXTHOP):
        with contextlib.suppress(OSError):  # missing in old kernels: then rounds detect the change
            sock.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
    return sock
