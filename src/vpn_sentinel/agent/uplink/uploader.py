"""Sends the spool's reports to the server, by any URL and address that works.

URLs are tried in their order, the first is preferred. A connection ends when an answer does not come for some seconds,
or when its route changed: after a tunnel is deleted, the old connection would hang for minutes, while a new one works
at once. A failure is logged when it changes, not each time.
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

_ACK_TIMEOUT_S: Final = 3.0
_HURRIED_LOOKUP_S: Final = 0.2  # for the lookup of the server's name after a change of the network
_CHECK_TIMEOUT_S: Final = 2.0  # for the check whether the preferred URL works
_MIN_TRY_INTERVAL_S: Final = 0.25  # between two tries while the network keeps changing
_DENIED_RETRY_S: Final = 60.0  # between tries with a key that is not accepted
_POST_PERIOD_S: Final = 300.0  # until a WebSocket is tried again
_SWITCH_BACK_AFTER_S: Final = 60.0  # on a fallback URL, until the preferred one is checked
_MAX_SWITCH_BACK_AFTER_S: Final = 900.0
_STEADY_S: Final = 10.0  # after a connection that lasted so long, the back-off starts anew
_MAX_ADDRESSES: Final = 4  # of one host name
_MAX_FAST_PASSES: Final = 2  # passes over all URLs with short timeouts, while urgent reports wait


class Uploader:
    """`run` never ends by itself. Call `wake` when the spool holds more, `hurry` when that is urgent: then an address
    that does not answer soon is left for another one.
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
        answer_timeout_s: float = _ACK_TIMEOUT_S,
        switch_back_after_s: float = _SWITCH_BACK_AFTER_S,
        wakeup: Wakeup | None = None,
    ) -> None:
        self._to = to
        self._spool = spool
        self._http = http
        self._clock = clock
        self._routes = routes or Routes()
        self._greeted = greeted
        self._batching = Batching(spool, answer_timeout_s)
        self._wakeup = wakeup or Wakeup()
        self._network_just_changed = False
        self._logged_failures: dict[str, str | None] = {}
        self._post_until: dict[str, float] = {}
        self._logged_as_posting: set[str] = set()  # URLs of which this was logged
        self._url, self._stored = "", False  # of the last greeted connection: whether the server stored reports
        self._urls_that_store_nothing: set[str] = set()  # the server greeted there and stored nothing
        self._back_after = switch_back_after_s
        self._unanswered_url: str | None = None  # where urgent reports got no answer
        self._retry_at_once = False
        self._has_several_addresses = False  # the host name in use has more than one address
        self._passes = 0  # over all URLs, since there are urgent reports
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
        # An agent that promised a report every few seconds must not wait for half a minute.
        longest = min(30.0, max(1.0, self._to.hello.interval))
        waits = backoff(0.5, longest)
        while True:
            started = self._clock.boottime()
            greeted, denied = await self._try_all_urls()
            if self._wakeup.network_has_changed or (greeted and self._clock.boottime() - started > _STEADY_S):
                waits = backoff(0.5, longest)
            if not (self._wakeup.network_has_changed or self._retry_at_once):
                await self._pause(max(next(waits), _DENIED_RETRY_S if denied else 0.0))
            elif (early := started + _MIN_TRY_INTERVAL_S - self._clock.boottime()) > 0:
                await asyncio.sleep(early)
            self._network_just_changed, self._wakeup.network_has_changed, self._retry_at_once = (
                self._wakeup.network_has_changed,
                False,
                False,
            )

    async def _try_all_urls(self) -> tuple[bool, bool]:
        """Try each URL until one works; return whether one did, and whether one denied the key or name."""
        denied = False
        self._passes += 1
        for url in self._order():
            try:
                tried = await self._serve(url, is_fallback=url != self._to.urls[0])
            except ChannelError as e:
                denied = denied or e.fault is Fault.DENIED
                self._log_change(url, str(e))
                continue
            if tried:
                return True, denied
        return False, denied

    def _order(self) -> tuple[str, ...]:
        """The URLs in order of preference; one that left urgent reports unanswered comes last."""
        urls = self._to.urls
        if self._unanswered_url is None:
            return urls
        return (*(u for u in urls if u != self._unanswered_url), self._unanswered_url)

    async def _pause(self, seconds: float) -> None:
        """Wait, but no longer once the network changes: what failed may work now."""
        end = self._clock.boottime() + seconds
        while not self._wakeup.network_has_changed and (left := end - self._clock.boottime()) > 0:
            await self._wakeup.wait(left)

    async def _serve(self, url: str, *, is_fallback: bool) -> bool:
        """Report to one URL until that ends; True when it worked. Raises ChannelError when it never did."""
        parts = split(url)
        try:
            # When the network just changed, DNS may have failed: then the last known addresses are used.
            hurried = self._network_just_changed or self._wakeup.urgent
            addresses = await self._http.names.addresses(parts.host, patience=_HURRIED_LOOKUP_S if hurried else None)
        except NotFoundError as e:
            raise ChannelError(Fault.BROKEN, str(e)) from e
        self._has_several_addresses = len(addresses) > 1  # e.g. IPv4 and IPv6
        error = ChannelError(Fault.BROKEN, "it has no address")
        left = deque((address, False) for address in addresses[:_MAX_ADDRESSES])
        while left:
            address, by_post = left.popleft()
            if not parts.secure and is_public(address) and not self._to.allow_insecure:
                error = ChannelError(Fault.BROKEN, f"{address} is public, and the key is not sent there in clear")
                continue
            tried = self._connection(url, address)
            try:
                switch_back = _PreferredUrlCheck(self, self._to.urls[0]) if is_fallback else None
                await self._report_by_best_means(tried, switch_back, by_post=by_post)
            except ChannelError as e:
                error = e
                if e.fault is Fault.HELD:
                    # The other IP version may work; only if none does, WebSockets are blocked.
                    left.append((address, True))
                if self._fails_fast():
                    self._unanswered_url, self._retry_at_once = url, tried.greeted
                if tried.greeted:
                    self._log_end(url, str(e))
            if tried.greeted:
                return True
            if error.fault is Fault.DENIED:
                break
        raise error

    def _log_end(self, url: str, why: str) -> None:
        if not self._stored:
            self._urls_that_store_nothing.add(url)
        self._log_change(url, why)

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
        has_alternative = len(self._to.urls) > 1 or self._has_several_addresses
        return self._wakeup.urgent and has_alternative and self._passes <= _MAX_FAST_PASSES

    async def _report_by_best_means(
        self, tried: ServerConnection, switch_back: "_PreferredUrlCheck | None", *, by_post: bool
    ) -> None:
        until = self._post_until.get(tried.url, 0.0)
        if by_post:
            until = self._no_websocket(tried.url, "no answer at any address")
        elif until <= self._clock.boottime():
            try:
                await tried.by_websocket(switch_back)
            except ChannelError as e:
                if e.fault not in (Fault.NO_WEBSOCKET, Fault.HELD) or tried.greeted:
                    raise
                if e.fault is Fault.HELD and self._has_several_addresses:
                    raise
                until = self._no_websocket(tried.url, str(e))
            else:
                return
            finally:
                if tried.greeted:
                    self._logged_as_posting.discard(tried.url)
        try:
            await tried.by_post(until)
        except ChannelError:
            if not tried.greeted:  # POST does not work either: begin with a WebSocket next time
                self._post_until.pop(tried.url, None)
            raise

    def _no_websocket(self, url: str, why: str) -> float:
        """Use POST for this URL from now on; returns until when."""
        if url not in self._logged_as_posting:
            self._logged_as_posting.add(url)
            log.info("no WebSocket is possible, reports go by POST", extra={"url": url, "reason": why})
        self._post_until[url] = self._clock.boottime() + _POST_PERIOD_S
        return self._post_until[url]

    async def is_open(self, url: str) -> bool:
        """Whether the server takes connections there."""
        parts = split(url)
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT_S):
                address = (await self._http.names.addresses(parts.host))[0]
                (await connected(address, parts.port)).close()
        except OSError:  # TimeoutError is one
            return False
        return True

    def next_check(self, *, found: bool) -> float:
        """When to check the preferred URL again: ever later where it accepts connections and then does not work."""
        if found:
            self._back_after = min(self._back_after * 2, _MAX_SWITCH_BACK_AFTER_S)
        return self._clock.boottime() + self._back_after

    @property
    def now(self) -> float:
        return self._clock.boottime()

    def _arrived(self, url: str, event: Greeted) -> None:
        host = split(url).host
        if known := self._http.names.known(host):
            self._spool.keep(f"addresses:{host}", json.dumps([str(a) for a in known]))
        self._url, self._stored = url, False
        # A server whose disk is full still greets: after a greeting without a stored report, only an ack counts.
        if url not in self._urls_that_store_nothing:
            self._log_change(url, None)
        self._greeted(event)

    def _acked(self) -> None:
        self.acked_at = self._clock.boottime()
        if not self._spool.pending:
            self._wakeup.urgent, self._unanswered_url = False, None
        if not self._stored:
            self._stored = True
            self._urls_that_store_nothing.discard(self._url)
            self._log_change(self._url, None)

    def _log_change(self, url: str, failure: str | None) -> None:
        if url in self._logged_failures and self._logged_failures[url] == failure:
            return
        if failure is None:
            log.info("connected", extra={"url": url})
            self._logged_failures.clear()  # log any failure from now on
        else:
            log.warning("cannot report", extra={"url": url, "reason": failure})
        self._logged_failures[url] = failure


class _PreferredUrlCheck:
    """A `SwitchBack`: checks from time to time whether the preferred URL works."""

    def __init__(self, uploader: Uploader, url: str) -> None:
        self._uploader = uploader
        self._url = url
        self.check_at = uploader.next_check(found=False)

    async def is_due(self) -> bool:
        if self._uploader.now < self.check_at:
            return False
        found = await self._uploader.is_open(self._url)
        self.check_at = self._uploader.next_check(found=found)
        return found


def read_list(text: str | None) -> list[str]:
    """The strings of a JSON list; empty for anything else."""
    try:
        found = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return []
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []


def _addresses(text: str | None) -> tuple[IPAddress, ...]:
    found = []
    for item in read_list(text):
        try:
            found.append(ip_address(item))
        except ValueError:
            continue
    return tuple(found)
