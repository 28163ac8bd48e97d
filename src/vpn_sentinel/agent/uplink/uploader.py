"""Carries the spool to the server, by whatever way is open.

Addresses of the server are tried in their order, the first preferred. An answer that stays away for some seconds, or a
route that changed under a connection, ends it: when a tunnel is deleted, the old connection hangs on for minutes
while a new one would leave at once. What fails is said when it changes, not each time.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.agent.net.http import Client, connected
from vpn_sentinel.agent.net.resolver import NotFoundError
from vpn_sentinel.agent.net.urls import split
from vpn_sentinel.agent.spool.spool import Spool
from vpn_sentinel.agent.uplink.batching import Batching
from vpn_sentinel.agent.uplink.channel import ChannelError, Fault
from vpn_sentinel.agent.uplink.connection import ReportTarget, Routes, ServerConnection, Wakeup
from vpn_sentinel.agent.uplink.session import Greeted
from vpn_sentinel.domain.policy import IPAddress, is_public
from vpn_sentinel.runtime.backoff import backoff
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

_ACK_TIMEOUT_S: Final = 3.0  # seconds for an acknowledgement
_HURRIED_LOOKUP_S: Final = 0.2  # seconds for the server's name after a change
_LOOK_TIMEOUT_S: Final = 2.0  # seconds to see whether the preferred way is open
_TRIES_APART_S: Final = 0.25  # seconds between two tries while the network keeps changing
_DENIED_RETRY_S: Final = 60.0  # seconds between tries of a key that is not accepted
_POST_FOR_S: Final = 300.0  # seconds until a WebSocket is tried again
_WAY_BACK_AFTER_S: Final = 60.0  # seconds on a second way until the preferred one is looked at
_MAX_WAY_BACK_AFTER_S: Final = 900.0
_STEADY_S: Final = 10.0  # seconds that a connection must have held for its end to be no reason to wait
_MAX_ADDRESSES: Final = 4  # of one name
_MAX_FAST_PASSES: Final = 2  # rounds through all ways that give each but little time, while bad news waits


class Uploader:
    """`run` never ends by itself. `wake` says that the spool holds more, `hurry` that what was put into it is bad news:
    then a way that does not answer soon is left for another.
    """

    def __init__(
        self,
        to: ReportTarget,
        spool: Spool,
        http: Client,
        clock: Clock,
        *,
        routes: Routes | None = None,
        greeted: Callable[[Greeted], None] = lambda _event: None,
        patience: float = _ACK_TIMEOUT_S,
        back_first: float = _WAY_BACK_AFTER_S,
        wakeup: Wakeup | None = None,
    ) -> None:
        self._to = to
        self._spool = spool
        self._http = http
        self._clock = clock
        self._routes = routes or Routes()
        self._greeted = greeted
        self._batching = Batching(spool, patience)
        self._wakeup = wakeup or Wakeup()
        self._hurried = False
        self._said: dict[str, str | None] = {}
        self._post_until: dict[str, float] = {}
        self._posting: set[str] = set()  # of which it was said
        self._url, self._stored = "", False  # of the connection that was greeted last: whether reports were stored
        self._fruitless: set[str] = set()  # greeted there and stored nothing
        self._back_after = back_first
        self._left: str | None = None  # the way that bad news got no answer on
        self._turned = False
        self._several = False  # the name that is tried has more than one address
        self._passes = 0  # through all ways, since there is bad news
        self.acked_at: float | None = None

    def wake(self) -> None:
        self._wakeup.wake()

    def network_changed(self) -> None:
        self._wakeup.network_changed()

    def hurry(self) -> None:
        if not self._wakeup.urgent:
            self._wakeup.urgent, self._passes = True, 0
        self._wakeup.wake()

    async def run(self) -> None:
        for host in {split(url).host for url in self._to.urls}:
            self._http.names.remember(host, _addresses(self._spool.fact(f"addresses:{host}")))
        # An agent that promised a report every few seconds may not be away for half a minute.
        longest = min(30.0, max(1.0, self._to.hello.interval))
        waits = backoff(0.5, longest)
        while True:
            started = self._clock.boottime()
            greeted, denied = await self._all_ways()
            if self._wakeup.network_has_changed or (greeted and self._clock.boottime() - started > _STEADY_S):
                waits = backoff(0.5, longest)
            if not (self._wakeup.network_has_changed or self._turned):
                await self._pause(max(next(waits), _DENIED_RETRY_S if denied else 0.0))
            elif (early := started + _TRIES_APART_S - self._clock.boottime()) > 0:
                await asyncio.sleep(early)
            self._hurried, self._wakeup.network_has_changed, self._turned = (
                self._wakeup.network_has_changed,
                False,
                False,
            )

    async def _all_ways(self) -> tuple[bool, bool]:
        """Try each URL until one has served; whether one did, and whether one denied us."""
        denied = False
        self._passes += 1
        for url in self._order():
            try:
                tried = await self._serve(url, second_way=url != self._to.urls[0])
            except ChannelError as e:
                denied = denied or e.fault is Fault.DENIED
                self._say(url, str(e))
                continue
            if tried:
                return True, denied
        return False, denied

    def _order(self) -> tuple[str, ...]:
        """The ways as they are preferred; one that left bad news unanswered comes last."""
        urls = self._to.urls
        if self._left is None:
            return urls
        return (*(u for u in urls if u != self._left), self._left)

    async def _pause(self, seconds: float) -> None:
        """Wait, but not on when the network changes: what was shut may be open now."""
        end = self._clock.boottime() + seconds
        while not self._wakeup.network_has_changed and (left := end - self._clock.boottime()) > 0:
            await self._wakeup.wait(left)

    async def _serve(self, url: str, *, second_way: bool) -> bool:
        """Carry reports by one URL until that ends; True when it served. Raises ChannelError when it never did."""
        where = split(url)
        try:
            # When the network just changed, DNS may be what broke: then the last good addresses must do.
            hurried = self._hurried or self._wakeup.urgent
            addresses = await self._http.names.addresses(where.host, patience=_HURRIED_LOOKUP_S if hurried else None)
        except NotFoundError as e:
            raise ChannelError(Fault.BROKEN, str(e)) from e
        self._several = len(addresses) > 1  # such as one of each family
        error = ChannelError(Fault.BROKEN, "it has no address")
        left = deque((address, False) for address in addresses[:_MAX_ADDRESSES])
        while left:
            address, by_post = left.popleft()
            if not where.secure and is_public(address) and not self._to.allow_insecure:
                error = ChannelError(Fault.BROKEN, f"{address} is public, and the key is not sent there in clear")
                continue
            tried = self._connection(url, address)
            try:
                back = _WayBack(self, self._to.urls[0]) if second_way else None
                await self._by_any_means(tried, back, by_post=by_post)
            except ChannelError as e:
                error = e
                if e.fault is Fault.HELD:
                    # Another family may be open; only where none is, it is the WebSocket that is not let through.
                    left.append((address, True))
                if self._fails_fast():
                    self._left, self._turned = url, tried.greeted
                if tried.greeted:
                    self._ended(url, str(e))
            if tried.greeted:
                return True
            if error.fault is Fault.DENIED:
                break
        raise error

    def _ended(self, url: str, why: str) -> None:
        if not self._stored:
            self._fruitless.add(url)
        self._say(url, why)

    def _connection(self, url: str, address: IPAddress) -> ServerConnection:
        return ServerConnection(
            to=self._to,
            url=url,
            address=address,
            spool=self._spool,
            batching=self._batching,
            http=self._http,
            clock=self._clock,
            routes=self._routes,
            wakeup=self._wakeup,
            arrived=self._arrived,
            acked=self._acked,
            fail_fast=self._fails_fast,
        )

    def _fails_fast(self) -> bool:
        other_way = len(self._to.urls) > 1 or self._several
        return self._wakeup.urgent and other_way and self._passes <= _MAX_FAST_PASSES

    async def _by_any_means(self, tried: ServerConnection, back: "_WayBack | None", *, by_post: bool) -> None:
        until = self._post_until.get(tried.url, 0.0)
        if by_post:
            until = self._no_websocket(tried.url, "no answer at any address")
        elif until <= self._clock.boottime():
            try:
                await tried.by_websocket(back)
            except ChannelError as e:
                if e.fault not in (Fault.NO_WEBSOCKET, Fault.HELD) or tried.greeted:
                    raise
                if e.fault is Fault.HELD and self._several:
                    raise
                until = self._no_websocket(tried.url, str(e))
            else:
                return
            finally:
                if tried.greeted:
                    self._posting.discard(tried.url)
        try:
            await tried.by_post(until)
        except ChannelError:
            if not tried.greeted:  # then POST is no better: the next try begins with a WebSocket again
                self._post_until.pop(tried.url, None)
            raise

    def _no_websocket(self, url: str, why: str) -> float:
        """Until when reports go by POST there."""
        if url not in self._posting:
            self._posting.add(url)
            log.info("no WebSocket can be had, reports go by POST", extra={"url": url, "reason": why})
        self._post_until[url] = self._clock.boottime() + _POST_FOR_S
        return self._post_until[url]

    async def is_open(self, url: str) -> bool:
        """Whether the server takes connections there."""
        where = split(url)
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT_S):
                address = (await self._http.names.addresses(where.host))[0]
                (await connected(address, where.port)).close()
        except OSError:  # TimeoutError is one
            return False
        return True

    def next_look(self, *, found: bool) -> float:
        """When to look at the preferred way again: later and later where it opens and then does not serve."""
        if found:
            self._back_after = min(self._back_after * 2, _MAX_WAY_BACK_AFTER_S)
        return self._clock.boottime() + self._back_after

    @property
    def now(self) -> float:
        return self._clock.boottime()

    def _arrived(self, url: str, event: Greeted) -> None:
        host = split(url).host
        if known := self._http.names.known(host):
            self._spool.keep(f"addresses:{host}", json.dumps([str(a) for a in known]))
        self._url, self._stored = url, False
        # A server whose disk is full greets all the same: after a greeting that led to nothing, only an ack is news.
        if url not in self._fruitless:
            self._say(url, None)
        self._greeted(event)

    def _acked(self) -> None:
        self.acked_at = self._clock.boottime()
        if not self._spool.pending:
            self._wakeup.urgent, self._left = False, None
        if not self._stored:
            self._stored = True
            self._fruitless.discard(self._url)
            self._say(self._url, None)

    def _say(self, url: str, trouble: str | None) -> None:
        if url in self._said and self._said[url] == trouble:
            return
        if trouble is None:
            log.info("connected", extra={"url": url})
            self._said.clear()  # what fails from here on is news
        else:
            log.warning("cannot report", extra={"url": url, "reason": trouble})
        self._said[url] = trouble


class _WayBack:
    """A `Leave`: looks from time to time whether the preferred way is open."""

    def __init__(self, uploader: Uploader, url: str) -> None:
        self._uploader = uploader
        self._url = url
        self.look_at = uploader.next_look(found=False)

    async def is_time(self) -> bool:
        if self._uploader.now < self.look_at:
            return False
        found = await self._uploader.is_open(self._url)
        self.look_at = self._uploader.next_look(found=found)
        return found


def read_list(text: str | None) -> list[str]:
    """A fact that holds a JSON list of texts; empty for anything else."""
    try:
        said = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return []
    return [item for item in said if isinstance(item, str)] if isinstance(said, list) else []


def _addresses(text: str | None) -> tuple[IPAddress, ...]:
    found = []
    for item in read_list(text):
        try:
            found.append(ip_address(item))
        except ValueError:
            continue
    return tuple(found)
