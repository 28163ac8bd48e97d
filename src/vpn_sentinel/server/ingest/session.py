"""An agent's session, by WebSocket or POST: checks messages and turns them into report batches."""

import math
from dataclasses import replace
from typing import Final

import msgspec
from sqlalchemy import select

from vpn_sentinel.domain.machine import Memory
from vpn_sentinel.domain.observation import Trigger
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.domain.tunnel import site_name, tunnel_name
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.access import Caller
from vpn_sentinel.server.ingest.admission import Refusal
from vpn_sentinel.server.ingest.pulse_registry import PulseRegistry
from vpn_sentinel.server.store.schema import tunnels
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.server.tracking.inputs import ReportBatch, TimedObservation
from vpn_sentinel.server.tracking.sites import REFERENCE
from vpn_sentinel.server.tracking.tracker import Tracker
from vpn_sentinel.wire import echo, limits
from vpn_sentinel.wire.codec import check_observation, check_policy, checked_text, decoder
from vpn_sentinel.wire.messages import PROTOCOL, Ack, Echo, Exchange, FromAgent, Hello, Known, Report, Reports, Welcome

_decode = decoder(FromAgent)
_memory = decoder(Memory)
_MAX_WALL_S: Final = 1e11  # the year 5138
_MAX_ROUND_S: Final = 60.0


class Sessions:
    """What all sessions share. `missed` is the number of reports that may be missing before a tunnel is silent."""

    def __init__(
        self,
        tracker: Tracker,
        store: Store,
        clock: Clock,
        *,
        echo_secret: bytes,
        echo_port: int,
        missed: int,
        canary_zone: str | None = None,
        pulse_registry: PulseRegistry | None = None,
    ) -> None:
        self._tracker = tracker
        self._store = store
        self._clock = clock
        self._echo_secret = echo_secret
        self._echo_port = echo_port
        self._missed = missed
        self._canary_zone = canary_zone
        self._registry = pulse_registry

    async def welcome(self, hello: Hello, caller: Caller, address: IPAddress | None) -> Welcome:
        """Answer a hello: how far the agent's spool is stored, how to send pulses. Raises Refusal (403, 422)."""
        _check_hello(hello)
        if not caller.may_report_as(hello.client_id):
            raise Refusal(403, f"this token may only report as {caller.name}")
        if hello.role == "reference" and not caller.may_be_reference_for(hello.site):
            raise Refusal(403, f"this token may only be the reference of the site {caller.name}; a shared key, of any")
        found = await self._store.read(
            select(tunnels.c.spool, tunnels.c.seq, tunnels.c.memory).where(tunnels.c.name == hello.client_id)
        )
        stored = found[0].seq if found and found[0].spool == hello.spool else 0
        if self._registry is not None:
            self._registry.greet(hello.client_id, caller.key)
        ident = echo.ident_for(self._echo_secret, hello.client_id)
        key = echo.key_for(self._echo_secret, ident)
        return Welcome(
            ack=stored,
            wall=self._clock.wall(),
            seen_from=None if address is None else str(address),
            echo=Echo(port=self._echo_port, id=ident.hex(), key=key.hex()),
            canary_zone=self._canary_zone,
            known=_known(found[0].memory) if found and hello.role != REFERENCE else None,
        )

    async def store(
        self, hello: Hello, reports: Reports, hello_ticks: float, peer: IPAddress | None, *, earlier_s: float = 0.0
    ) -> Ack:
        """Store one message of reports of a session with `peer`; return after the commit.

        `hello_ticks` is the boot time at which its hello came; the agent could already send `earlier_s` seconds before.
        Raises Refusal (422), and StoreUnavailable or Busy.
        """
        if not reports.items:
            return Ack(seq=0)
        _check_reports(reports)
        now = self._clock.wall()
        # By the wall clock as it is now: it may have been set since the hello, as a session is long.
        hello_at = now - (self.ticks() - hello_ticks)
        await self._tracker.submit(
            ReportBatch(
                tunnel=hello.client_id,
                received_at=now,
                observations=tuple(_timed(r, now) for r in reports.items),
                # A report is due after `interval` at the latest; one second more for its transit.
                silent_after=self._missed * hello.interval + 1.0,
                interval=hello.interval,
                version=hello.version,
                spool=hello.spool,
                policy=hello.policy,
                caught_up=reports.pending == 0,
                thinned=reports.thinned,
                skew=hello.wall - hello_at,
                connected_at=hello_at - earlier_s,
                peer=peer,
                role=hello.role,
                site=hello.site,
            )
        )
        return Ack(seq=reports.items[-1].seq)

    def key_revoked(self, hello: Hello, caller: Caller) -> None:
        """The key of this session was revoked: the pulse port forgets the tunnel, unless it used another key since."""
        if self._registry is not None:
            self._registry.forget(hello.client_id, caller.key, self.ticks())

    def ticks(self) -> float:
        return self._clock.boottime()


def _known(text: str) -> Known | None:
    """The working tunnel as a row's memory knows it; None if it never worked, or a newer server wrote the row."""
    try:
        memory = _memory(text) if text else Memory()
    except (ValueError, RecursionError):
        return None
    if memory.working is None:
        return None
    return Known(device=memory.working.device, beside=memory.working.beside, home=memory.home)


def parse(body: bytes | str) -> Hello | Reports | Exchange:
    """Raises Refusal: 400 for what is not JSON, 422 for JSON that is not one of our messages."""
    try:
        return _decode(body.decode() if isinstance(body, bytes) else body)  # type: ignore[no-any-return]
    except msgspec.ValidationError as e:
        raise Refusal(422, str(e)) from e
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
        raise Refusal(400, f"the message is not JSON: {e}") from e


def _check_hello(hello: Hello) -> None:
    try:
        tunnel_name(hello.client_id)
        checked_text("version", hello.version, 64)
        checked_text("spool", hello.spool, 64)
        site_name(hello.site)
        check_policy(hello.policy)
    except ValueError as e:
        raise Refusal(422, str(e)) from e
    if hello.spool in ("", "keepalive", "pulse"):
        raise Refusal(422, "spool is the random name of an agent's spool")
    if hello.role not in ("tunnel", "reference"):
        raise Refusal(422, "role is tunnel or reference")
    if hello.role == "reference" and not hello.site:
        raise Refusal(422, "a reference agent names its site: set VPN_SENTINEL_SITE")
    if hello.protocol > PROTOCOL or hello.protocol < 1:
        raise Refusal(422, f"protocol {hello.protocol} is not known here: upgrade the server")
    if not 0.1 <= hello.interval <= 86400:
        raise Refusal(422, "interval takes 0.1 to 86400 seconds")
    if not 0 <= hello.wall < _MAX_WALL_S:
        raise Refusal(422, "wall is not a time")


def _check_reports(reports: Reports) -> None:
    if len(reports.items) > limits.MAX_REPORTS:
        raise Refusal(422, f"a message takes at most {limits.MAX_REPORTS} reports")
    if reports.pending < 0 or reports.thinned < 0:
        raise Refusal(422, "pending and thinned are not below zero")
    last = 0
    for report in reports.items:
        if not last < report.seq < 2**53:
            raise Refusal(422, f"seq {report.seq} does not follow {last}")
        if not 0 <= report.age < math.inf:
            raise Refusal(422, "age is not a duration")
        if report.observation.trigger in (Trigger.PULSE, Trigger.KEEPALIVE):
            raise Refusal(422, f"the trigger {report.observation.trigger} is not an agent's")
        try:
            check_observation(report.observation)
        except ValueError as e:
            raise Refusal(422, str(e)) from e
        last = report.seq


def _timed(report: Report, now: float) -> TimedObservation:
    # Fields that only the server may fill are not accepted from an agent.
    seen = replace(report.observation, reported_from=None, port_check=None, reference_up=None, unheard=None)
    # An agent that started with its clock in 1970 may send absurd ages; refusing them would block its spool for ever.
    age = min(report.age, limits.MAX_REPORT_AGE_S)
    # An observation dates from the begin of its round, which is earlier by the time that it waited for answers.
    return TimedObservation(seq=report.seq, at=now - age - min(seen.took_ms / 1000, _MAX_ROUND_S), observation=seen)
