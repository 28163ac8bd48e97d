"""One way to the server, while it lasts: greet, report, take acknowledgements; over a WebSocket or by POST."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.urls import split
from vpn_sentinel.agent.spool.spool import Spool
from vpn_sentinel.agent.uplink.batching import Batching
from vpn_sentinel.agent.uplink.channel import CHANGED, ChannelError, Fault, MessageChannel
from vpn_sentinel.agent.uplink.post import post
from vpn_sentinel.agent.uplink.session import Acked, Greeted, Phase, ProtocolError, Session, TurnedAway
from vpn_sentinel.agent.uplink.websocket import open_websocket
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.wire.messages import Hello, Report, fingerprint

CONNECT_TIMEOUT_S: Final = 4.0  # seconds for a connection with its handshakes
# The same, and the seconds for an answer, while bad news waits and another way may be open.
FAST_CONNECT_S: Final = 0.7
FAST_ANSWER_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTarget:
    """Who is told, and as whom. `hello` is completed with the spool's identity and the time."""

    urls: tuple[str, ...]
    api_path: str
    key: Secret
    allow_insecure: bool
    hello: Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """What the kernel knows of ways: `way` is where a TCP connection to an address and port would leave, in any
    comparable form; `owns` is whether an address is still this host's.
    """

    way: Callable[[IPAddress, int], object] = lambda _address, _port: None
    owns: Callable[[IPAddress], bool] = lambda _address: True


class Wakeup:
    """Wakes the uploader: there is more to send, something came in, or the network changed (`network_has_changed`).

    `urgent` while bad news waits for its acknowledgement.
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
    """With one address of the server under one URL. `greeted` becomes true once the server answered there.

    `arrived` is called for each greeting, `acked` for each acknowledgement. `fail_fast` is asked
    whether bad news waits and another way may be open, so that this one is given little time.
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
    _told: bool = False  # the server itself said no
    _until: float | None = None
    _inbox: list[bytes | ChannelError] = field(default_factory=list)
    _sent: list[Report] = field(default_factory=list)
    _sent_as: str = ""  # their message's fingerprint

    @property
    def _path(self) -> str:
        return self.url + self.to.api_path + "/agent"

    def _way(self) -> object:
        return self.routes.way(self.address, split(self.url).port)

    async def by_websocket(self, leave: "Leave | None" = None) -> None:
        """Report until the connection ends, which raises ChannelError, or until `leave` says that it is time to."""
        channel = await self._open()
        broken: ChannelError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                receiving = group.create_task(self._receive(channel))
                try:
                    await self._converse(channel, leave)
                    await channel.close()
                except ChannelError as e:  # raised below, where no group wraps it
                    broken = e
                finally:
                    receiving.cancel()
        finally:
            channel.abort()
        if broken is None:
            return
        silent = broken.fault in (Fault.BROKEN, Fault.CUT) and not (self.greeted or self._told)
        if silent and not (self.wakeup.network_has_changed or self.fail_fast()):
            # It opened, and the server never spoke through it: so little leads there by a WebSocket.
            raise ChannelError(Fault.HELD, str(broken)) from broken
        raise broken

    async def by_post(self, until: float) -> None:
        """Report by one request after another. Raises ChannelError at the first that fails."""
        acked = 0
        while until > self.clock.boottime():
            reports = self.batching.reports(acked)
            if not reports and self.greeted:
                await self.wakeup.wait(until - self.clock.boottime())
                self.wakeup.network_has_changed = False
                continue
            session = self._session()
            pending, thinned = self.batching.left_behind(reports), self.spool.thinned
            body = session.exchange(reports, pending=pending, thinned=thinned, now=self.clock.boottime())
            limit = self.batching.patience + CONNECT_TIMEOUT_S
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
        """Connect, unless the way there changes meanwhile: a connection's packets keep the address they began with."""
        way = self._way()

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
            why, until = "the way to the server changed", None
            while not opening.done():
                # Bad news may come while this is on its way.
                now = self.clock.boottime()
                until = (until or now + FAST_CONNECT_S) if self.fail_fast() else None
                if until is not None and now >= until:
                    why = f"no connection within {FAST_CONNECT_S:g} s, and bad news waits"
                    break
                await self.wakeup.wait(None if until is None else until - now)
                if self.wakeup.network_has_changed and self._way() != way:
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

    async def _converse(self, channel: MessageChannel, leave: "Leave | None") -> None:
        way = self._way()
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
                if not self.routes.owns(channel.local) or self._way() != way:
                    raise ChannelError(Fault.BROKEN, "the way to the server changed")
                self.wakeup.network_has_changed = False
            if leave is not None and session.phase is Phase.READY and await leave.is_time():
                return
            if session.phase is Phase.READY and (reports := self.batching.reports(session.acked)):
                self._sent = reports
                pending, thinned = self.batching.left_behind(reports), self.spool.thinned
                data = session.offer(reports, pending=pending, thinned=thinned, now=self.clock.boottime())
                self._sent_as = fingerprint(data)
                await self._send(channel, data)
            self._press(session)
            deadlines = [d for d in (session.deadline, self._until, leave.look_at if leave else None) if d is not None]
            await self.wakeup.wait(max(0.0, min(deadlines) - self.clock.boottime()) if deadlines else None)

    def _press(self, session: Session) -> None:
        """Give an awaited answer little time while bad news waits. Raises ChannelError when that has passed."""
        now = self.clock.boottime()
        if session.deadline is None or not self.fail_fast():
            self._until = None
        elif self._until is None:
            self._until = now + FAST_ANSWER_S
        elif now >= self._until:
            raise ChannelError(Fault.BROKEN, "no answer to bad news: another way is tried")

    def _session(self) -> Session:
        hello = msgspec.structs.replace(self.to.hello, spool=self.spool.identity, wall=self.clock.wall())
        return Session(hello, last=self.batching.sent_upto, patience=self.batching.patience)

    async def _send(self, channel: MessageChannel, data: bytes) -> None:
        try:
            async with asyncio.timeout(self.batching.patience):
                await channel.send(data)
        except TimeoutError as e:
            raise ChannelError(Fault.BROKEN, "the server takes no data") from e

    def _take_in(self, session: Session, item: bytes | ChannelError) -> None:
        """Act on what the server said. Raises ChannelError when that ends the connection."""
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
                raise ChannelError(Fault.BROKEN, "the server knows more of this spool than we do: it is named anew")
            case Greeted():
                self.greeted = True
                waited = self.spool.pending
                self.spool.forget(event.ack)
                self.arrived(self.url, event)
                # A greeting alone stores nothing: it counts where it took reports along, or none were waiting.
                if self.spool.pending < waited or not self.spool.pending:
                    self.acked()
            case Acked():
                self.spool.forget(event.upto)
                self.spool.settled(event.thinned)
                self.batching.stored()
                self.acked()
            case TurnedAway():
                raise self._turned_away(event, waiting=waiting)

    def _turned_away(self, event: TurnedAway, *, waiting: bool) -> ChannelError:
        self._told = True
        if event.of not in ("", self._sent_as):
            return ChannelError(Fault.BROKEN, CHANGED)
        if event.of:
            self.batching.refused(self._sent, event.reason)
        fault = Fault.BROKEN if event.retry or waiting else Fault.DENIED
        return ChannelError(fault, f"the server refuses: {event.reason}")


class Leave(Protocol):
    """Tells a connection on a second way when the preferred one is open again. `look_at` is when to ask next."""

    look_at: float

    async def is_time(self) -> bool: ...
