"""One connection to the server until it ends: greet, report, take acknowledgements; over a WebSocket or by POST."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.urls import split
from vpn_sentinel.agent.spool.spool import Spool
from vpn_sentinel.agent.uplink.batching import Batching
from vpn_sentinel.agent.uplink.channel import ALTERED, ChannelError, Fault, MessageChannel
from vpn_sentinel.agent.uplink.post import post
from vpn_sentinel.agent.uplink.session import Acked, Greeted, Phase, ProtocolError, RefusedByServer, Session
from vpn_sentinel.agent.uplink.websocket import open_websocket
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.wire.messages import Hello, Report, fingerprint

CONNECT_TIMEOUT_S: Final = 4.0  # for a connection with its handshakes
# The same, and the time for an answer, while urgent reports wait and another address or URL may work.
FAST_CONNECT_S: Final = 0.7
FAST_ANSWER_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTarget:
    """The server, and how the agent introduces itself. The spool's identity and the time are added to `hello`."""

    urls: tuple[str, ...]
    api_path: str
    key: Secret
    allow_insecure: bool
    hello: Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """Lookups in the kernel: `route_to` returns where a TCP connection to an address and port would leave, in any
    comparable form; `owns` returns whether an address is still this host's.
    """

    route_to: Callable[[IPAddress, int], object] = lambda _address, _port: None
    owns: Callable[[IPAddress], bool] = lambda _address: True


class Wakeup:
    """Wakes the uploader: there is more to send, something came in, or the network changed (`network_has_changed`).

    `urgent` while a report of trouble waits for its acknowledgement.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self.network_has_changed = False
        self.urgent = False

    def wake(self) -> None:
        self._changed.set()

    def network_changed(self) -> None:
        self.network_has_changed = True
        self._changed.set()

    async def wait(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()


@dataclass(slots=True, kw_only=True)
class ServerConnection:
    """A connection to one address of the server under one URL. `greeted` becomes true once the server answered.

    `arrived` is called for each greeting, `acked` for each acknowledgement. `fail_fast` returns whether urgent reports
    wait and another address or URL may work, so that this one gets little time.
    """

    to: ReportTarget
    url: str
    address: IPAddress
    spool: Spool
    batching: Batching
    http: Client
    clock: Clock
    routes: Routes
    wakeup: Wakeup
    arrived: Callable[[str, Greeted], None]
    acked: Callable[[], None]
    fail_fast: Callable[[], bool] = lambda: False
    greeted: bool = False
    _was_refused: bool = False  # by the server itself
    _fast_deadline: float | None = None
    _inbox: list[bytes | ChannelError] = field(default_factory=list)
    _sent: list[Report] = field(default_factory=list)
    _sent_as: str = ""  # the fingerprint of their message

    @property
    def _path(self) -> str:
        return self.url + self.to.api_path + "/agent"

    def _current_route(self) -> object:
        return self.routes.route_to(self.address, split(self.url).port)

    async def by_websocket(self, switch_back: "SwitchBack | None" = None) -> None:
        """Report until the connection ends, which raises ChannelError, or until `switch_back` is due."""
        channel = await self._open()
        broken: ChannelError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                receiving = group.create_task(self._receive(channel))
                try:
                    await self._exchange_messages(channel, switch_back)
                    await channel.close()
                except ChannelError as e:  # raised below, where no group wraps it
                    broken = e
                finally:
                    receiving.cancel()
        finally:
            channel.abort()
        if broken is None:
            return
        silent = broken.fault in (Fault.BROKEN, Fault.CUT) and not (self.greeted or self._was_refused)
        if silent and not (self.wakeup.network_has_changed or self.fail_fast()):
            # It opened, and the server never answered through it: WebSockets do not work there.
            raise ChannelError(Fault.HELD, str(broken)) from broken
        raise broken

    async def by_post(self, until: float) -> None:
        """Report by one request after another. Raises ChannelError at the first failure."""
        acked = 0
        while until > self.clock.boottime():
            reports = self.batching.reports(acked)
            if not reports and self.greeted:
                await self.wakeup.wait(until - self.clock.boottime())
                self.wakeup.network_has_changed = False
                continue
            session = self._session()
            pending, thinned = self.batching.still_pending(reports), self.spool.thinned
            body = session.exchange(reports, pending=pending, thinned=thinned, now=self.clock.boottime())
            limit = self.batching.answer_timeout_s + CONNECT_TIMEOUT_S
            try:
                answer = await post(self.http, self._path, self.address, self.to.key, body, limit=limit)
            except ChannelError as e:
                if e.fault is Fault.REJECTED:
                    self.batching.refused(reports, str(e))
                elif e.fault is Fault.CUT:
                    self.batching.overdue()
                raise
            self._take_in(session, answer)
            if reports and session.acked < reports[-1].seq:
                raise ChannelError(Fault.BROKEN, "the server did not store what it was sent")
            acked = session.acked
            if reports:
                self.batching.stored()
                self.spool.settled(thinned)

    async def _open(self) -> MessageChannel:
        """Connect, unless the route changes meanwhile: a connection's packets keep their source address."""
        route_to = self._current_route()

        async def attempt() -> MessageChannel | ChannelError:
            try:
                return await open_websocket(
                    self._path, self.address, self.to.key, self.http.tls, limit=CONNECT_TIMEOUT_S
                )
            except ChannelError as e:
                return e

        async with asyncio.TaskGroup() as group:
            opening = group.create_task(attempt())
            opening.add_done_callback(lambda _: self.wakeup.wake())
            why, until = "the route to the server changed", None
            while not opening.done():
                # A report may become urgent while this connects.
                now = self.clock.boottime()
                until = (until or now + FAST_CONNECT_S) if self.fail_fast() else None
                if until is not None and now >= until:
                    why = f"no connection within {FAST_CONNECT_S:g} s, and urgent reports wait"
                    break
                await self.wakeup.wait(None if until is None else until - now)
                if self.wakeup.network_has_changed and self._current_route() != route_to:
                    break
            opening.cancel()
        if opening.cancelled():
            raise ChannelError(Fault.BROKEN, why)
        result = opening.result()
        if isinstance(result, ChannelError):
            raise result
        return result

    async def _receive(self, channel: MessageChannel) -> None:
        try:
            while True:
                self._inbox.append(await channel.receive())
                self.wakeup.wake()
        except ChannelError as e:
            self._inbox.append(e)
            self.wakeup.wake()

    async def _exchange_messages(self, channel: MessageChannel, switch_back: "SwitchBack | None") -> None:
        route_to = self._current_route()
        session = self._session()
        await self._send(channel, session.open(self.clock.boottime()))
        while True:
            while self._inbox:
                self._take_in(session, self._inbox.pop(0))
            if session.overdue(self.clock.boottime()):
                if self.greeted:
                    self.batching.overdue()
                raise ChannelError(Fault.BROKEN, "the server does not answer")
            if self.wakeup.network_has_changed:
                if not self.routes.owns(channel.local) or self._current_route() != route_to:
                    raise ChannelError(Fault.BROKEN, "the route to the server changed")
                self.wakeup.network_has_changed = False
            if switch_back is not None and session.phase is Phase.READY and await switch_back.is_due():
                return
            if session.phase is Phase.READY and (reports := self.batching.reports(session.acked)):
                self._sent = reports
                pending, thinned = self.batching.still_pending(reports), self.spool.thinned
                data = session.offer(reports, pending=pending, thinned=thinned, now=self.clock.boottime())
                self._sent_as = fingerprint(data)
                await self._send(channel, data)
            self._enforce_fast_answer(session)
            deadlines = [
                d
                for d in (session.deadline, self._fast_deadline, switch_back.check_at if switch_back else None)
                if d is not None
            ]
            await self.wakeup.wait(max(0.0, min(deadlines) - self.clock.boottime()) if deadlines else None)

    def _enforce_fast_answer(self, session: Session) -> None:
        """Give an answer little time while urgent reports wait. Raises ChannelError when it has passed."""
        now = self.clock.boottime()
        if session.deadline is None or not self.fail_fast():
            self._fast_deadline = None
        elif self._fast_deadline is None:
            self._fast_deadline = now + FAST_ANSWER_S
        elif now >= self._fast_deadline:
            raise ChannelError(Fault.BROKEN, "no answer to an urgent report: another address is tried")

    def _session(self) -> Session:
        hello = msgspec.structs.replace(self.to.hello, spool=self.spool.identity, wall=self.clock.wall())
        return Session(hello, last=self.batching.max_sent_seq, answer_timeout_s=self.batching.answer_timeout_s)

    async def _send(self, channel: MessageChannel, data: bytes) -> None:
        try:
            async with asyncio.timeout(self.batching.answer_timeout_s):
                await channel.send(data)
        except TimeoutError as e:
            raise ChannelError(Fault.BROKEN, "the server takes no data") from e

    def _take_in(self, session: Session, item: bytes | ChannelError) -> None:
        """Handle a message of the server. Raises ChannelError when that ends the connection."""
        waiting = session.phase is Phase.WAITING
        if isinstance(item, ChannelError):
            if item.fault is Fault.CUT and waiting:
                self.batching.overdue()
            raise item
        try:
            event = session.receive(item)
        except ProtocolError as e:
            raise ChannelError(Fault.BROKEN, str(e)) from e
        match event:
            case Greeted(stale=True):
                self.spool.renew()
                raise ChannelError(
                    Fault.BROKEN, "the server has more of this spool than the agent: the spool gets a new identity"
                )
            case Greeted():
                self.greeted = True
                waited = self.spool.pending
                self.spool.forget(event.ack)
                self.arrived(self.url, event)
                # A greeting alone stores nothing: it counts as an ack where it acknowledged reports, or none were
                # waiting.
                if self.spool.pending < waited or not self.spool.pending:
                    self.acked()
            case Acked():
                self.spool.forget(event.up_to)
                self.spool.settled(event.thinned)
                self.batching.stored()
                self.acked()
            case RefusedByServer():
                raise self._refused(event, waiting=waiting)

    def _refused(self, event: RefusedByServer, *, waiting: bool) -> ChannelError:
        self._was_refused = True
        if event.of not in ("", self._sent_as):
            return ChannelError(Fault.BROKEN, ALTERED)
        if event.of:
            self.batching.refused(self._sent, event.reason)
        fault = Fault.BROKEN if event.retry or waiting else Fault.DENIED
        return ChannelError(fault, f"the server refuses: {event.reason}")


class SwitchBack(Protocol):
    """Ends a connection to a fallback URL when the preferred URL works again. `check_at` is the time of the next
    check.
    """

    check_at: float

    async def is_due(self) -> bool: ...
