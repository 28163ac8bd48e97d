"""The kernel's own news: links, addresses, routes, nexthop objects and rules, the moment they change (rtnetlink(7)).

Not all of it is news. Router advertisements renew addresses every few seconds and Wi-Fi drivers repeat their links;
what repeats the state that is known is left out.
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
_RTNLGRP_IPV6_RULE, _RTNLGRP_NEXTHOP = 19, 32  # a membership alone brings these two
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
RETRY_S: Final = 1.0  # until another socket is tried for
DEBOUNCE_S: Final = 0.05  # one `ip link del` makes several messages
# Full tables take a while to read. Who is told of changes without end shall not do that alone: beyond so many seconds
# of the processor that are free, it rests so many times as long as it took, and so many seconds at most.
_FREE_CPU_S, _REST_TIMES, _MAX_REST_S = 0.1, 9, 10.0


class NetworkChanges:
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
            news = self._is_new(message.type, message.body) or news
        return news

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
        self._changes = NetworkChanges(interfaces)
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
            self._timer = loop.call_at(max(loop.time() + DEBOUNCE_S, self._rested), self._tell)

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
            self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._open_again)
            return
        self.start()
        self._soon()  # what happened meanwhile was told to nobody

    def _tell(self) -> None:
        self._timer = None
        began = time.thread_time()  # of this thread: that the machine is busy costs no rest
        self._changed()
        took = time.thread_time() - began
        self._rested = asyncio.get_running_loop().time() + min(_REST_TIMES * max(0.0, took - _FREE_CPU_S), _MAX_REST_S)


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
    for group in (_RTNLGRP_IPV6_RULE, _RTNLGRP_NEXTHOP):
        with contextlib.suppress(OSError):  # an old kernel has none of them: the rounds see what changed
            sock.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
    return sock
