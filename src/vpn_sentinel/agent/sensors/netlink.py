"""The kernel's own news: links, addresses, routes, nexthop objects and rules, the moment they change (rtnetlink(7)).

Not all of it is news. Router advertisements renew addresses every few seconds and Wi-Fi drivers repeat their links;
what repeats the state that is known is left out.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import struct
import time
from collections.abc import Callable
from typing import Final

from vpn_sentinel.agent.net.link import IFF_LOWER_UP, IFF_UP, Interface
from vpn_sentinel.agent.net.rtnetlink import (
    DELADDR,
    DELLINK,
    DELNEXTHOP,
    DELROUTE,
    DELRULE,
    NEWADDR,
    NEWLINK,
    NEWNEXTHOP,
    NEWROUTE,
    NEWRULE,
    messages,
    parse_address,
    parse_link,
)
from vpn_sentinel.domain.policy import IPAddress

log = logging.getLogger(__name__)

# RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE, _IPV6_IFADDR, _IPV6_ROUTE; the other two have a number only.
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400
_IPV6_RULE, _NEXTHOP = 19, 32
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_TABLE_LOCAL: Final = 255
_CLONED: Final = 0x200
_FLAGS: Final = struct.Struct("=I")  # rtm_flags
RETRY: Final = 1.0  # seconds until another socket is tried for
DEBOUNCE: Final = 0.05  # seconds; one `ip link del` makes several messages
# Full tables take a while to read. Who is told of changes without end shall not do that alone: beyond so many seconds
# of the processor that are free, it rests so many times as long as it took, and so many seconds at most.
_FREE, _REST, _LONGEST = 0.1, 9, 10.0


class Changes:
    """Tells changes from repetitions."""

    def __init__(self, interfaces: tuple[Interface, ...] = ()) -> None:
        self._links = {i.index: _state(i) for i in interfaces}
        self._addresses: set[tuple[int, IPAddress]] = {(i.index, a) for i in interfaces for a in i.addresses}
        self._complete = True

    def forget(self) -> None:
        """Messages were lost: what is known may be stale, and what seems to repeat it may be news."""
        self._links.clear()
        self._addresses.clear()
        self._complete = False

    def notice(self, data: bytes) -> bool:
        """Take in one datagram; whether anything in it is new."""
        news = False
        for message in messages(data):  # each is taken in, also behind one that is news
            news = self._is_new(message.kind, message.body) or news
        return news

    def _is_new(self, kind: int, body: bytes) -> bool:
        match kind:
            case _ if kind in (NEWLINK, DELLINK):
                return self._link(kind, body)
            case _ if kind in (NEWADDR, DELADDR):
                return self._address(kind, body)
            case _ if kind in (NEWROUTE, DELROUTE):
                # Routes of the host's own addresses follow address messages; cloned ones are mere cache entries.
                return len(body) >= 12 and body[4] != _TABLE_LOCAL and not _FLAGS.unpack_from(body, 8)[0] & _CLONED
            case _:
                return kind in (NEWRULE, DELRULE, NEWNEXTHOP, DELNEXTHOP)

    def _link(self, kind: int, body: bytes) -> bool:
        link = parse_link(body)
        if link is None:
            return False
        if kind == DELLINK:
            return self._links.pop(link.index, None) is not None or not self._complete
        old, self._links[link.index] = self._links.get(link.index), _state(link)
        return old != _state(link)

    def _address(self, kind: int, body: bytes) -> bool:
        address = parse_address(body)
        if address is None:
            return False
        known = address in self._addresses
        if kind == DELADDR:
            self._addresses.discard(address)
            return known or not self._complete
        self._addresses.add(address)
        return not known


def _state(interface: Interface) -> tuple[str, int]:
    return interface.name, interface.flags & (IFF_UP | IFF_LOWER_UP)


class NetworkSensor:
    """Calls `changed` soon after something changed; many changes at once are one.

    So are all that come while it rests from a call that took long.
    """

    def __init__(
        self,
        changed: Callable[[], None],
        interfaces: tuple[Interface, ...] = (),
        sock: socket.socket | None = None,
        subscribe: Callable[[], socket.socket] | None = None,
    ) -> None:
        """`interfaces` is the state that is known; `sock` takes the kernel's place. Raises OSError without netlink."""
        self._subscribe = subscribe or subscribed
        self._changed = changed
        self._changes = Changes(interfaces)
        self._sock = sock or self._subscribe()
        self._retry: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rested = 0.0  # when, by the loop's clock, `changed` may be called again

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
        news = False
        while True:
            try:
                news = self._changes.notice(self._sock.recv(65536)) or news
            except BlockingIOError:
                break
            except OSError as e:
                news = True
                self._changes.forget()
                if e.errno != errno.ENOBUFS:  # that one: so much changed that the kernel dropped some of it
                    self._renew(e)
                    break
        if news:
            self._soon()

    def _soon(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time() + DEBOUNCE, self._rested), self._ring)

    def _renew(self, error: OSError) -> None:
        """A socket that fails otherwise hears nothing any more, and would fail at once again."""
        log.warning("the kernel's news broke off: listening anew", extra={"reason": error.strerror})
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        self._open_again()

    def _open_again(self) -> None:
        self._retry = None
        try:
            self._sock = self._subscribe()
        except OSError:
            self._retry = asyncio.get_running_loop().call_later(RETRY, self._open_again)
            return
        self.start()
        self._soon()  # what happened meanwhile was told to nobody

    def _ring(self) -> None:
        self._timer = None
        began = time.thread_time()  # of this thread: that the machine is busy costs no rest
        self._changed()
        took = time.thread_time() - began
        self._rested = asyncio.get_running_loop().time() + min(_REST * max(0.0, took - _FREE), _LONGEST)


def subscribed() -> socket.socket:
    """A netlink socket that hears of links, addresses, routes, nexthop objects and rules. Raises OSError."""
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
    )
    try:
        sock.bind((0, _GROUPS))
    except OSError:
        sock.close()
        raise
    for group in (_IPV6_RULE, _NEXTHOP):
        with contextlib.suppress(OSError):  # an old kernel has none of them: the rounds see what changed
            sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
    return sock
