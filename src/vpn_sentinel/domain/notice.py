"""Which notices people get, and when: decided from the last notice, so that each DOWN has its UP and the reverse."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from vpn_sentinel.domain.machine import Event, ExitChanged, Memory, Outage, PortChanged, StateChanged
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.domain.verdict import HARM, MEANING, Code, Finding, Severity, State

_NO_TROUBLE = (State.PROTECTED, State.PENDING)
# Observed trouble, whose end is always notified.
_OBSERVED_TROUBLE = (State.LEAKING, State.DOWN, State.DEGRADED)


class Kind(StrEnum):
    SERVER_STARTED = "server_started"
    DATABASE_DAMAGED = "database_damaged"
    SERVER_OVERLOADED = "server_overloaded"
    SERVER_RECOVERED = "server_recovered"
    CONNECTED = "connected"
    ADDRESS_CHANGED = "address_changed"
    PORT_CHANGED = "port_changed"
    LEAKING = "leaking"
    DOWN = "down"
    DEGRADED = "degraded"
    SILENT = "silent"
    UNVERIFIED = "unverified"
    RECOVERED = "recovered"
    TEST = "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One notice. Times are seconds since the epoch; `began` is when the trouble began or the change was seen.

    `was` is, for a recovery, the worst state of the outage, and for trouble the leak that it follows; `first`: the
    tunnel was never protected before; `details` are lines that are shown unchanged. `role` and `site` are the agent's
    (see wire.messages.Hello). For one that sums up several, see `summed_up`.
    """

    kind: Kind
    tunnel: str = ""
    at: float = 0.0
    began: float | None = None
    was: State | None = None
    exit: IPAddress | None = None
    old_exit: IPAddress | None = None
    findings: tuple[Finding, ...] = ()
    place: str = ""
    provider: str = ""
    timezone: str = ""
    resolvers: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    port: int | None = None
    old_port: int | None = None
    role: str = "tunnel"
    site: str = ""
    first: bool = False

    @property
    def outage(self) -> float | None:
        """Length in seconds of the trouble that a recovery ends."""
        ends = self.kind in (Kind.RECOVERED, Kind.SERVER_RECOVERED)
        return self.at - self.began if ends and self.began is not None else None


_KIND_OF = {
    State.LEAKING: Kind.LEAKING,
    State.DOWN: Kind.DOWN,
    State.DEGRADED: Kind.DEGRADED,
    State.SILENT: Kind.SILENT,
    State.UNVERIFIED: Kind.UNVERIFIED,
}

# Kinds that do not show the state of a tunnel.
STATELESS = frozenset(
    {
        Kind.SERVER_STARTED,
        Kind.DATABASE_DAMAGED,
        Kind.SERVER_OVERLOADED,
        Kind.SERVER_RECOVERED,
        Kind.PORT_CHANGED,
        Kind.TEST,
    }
)


def summed_up(last: Notice, changes: int, leaks: int, leak: Notice | None, port: Notice | None) -> Notice:
    """One notice for `changes` of a tunnel that changes too often to notify each.

    `last` is the latest with a state, so this one shows the present state; `leaks` is how many were leaks, and `leak`
    and `port` are the latest of these kinds. A leak that is over is included: as `was`, and with its findings.
    """
    lines = [
        f"{changes} changes since the last message are summed up here: {last.tunnel} changes too often to notify each."
    ]
    if leaks:
        times = "one was a leak" if leaks == 1 else f"{leaks} were leaks"
        lines.append(f"Of them {times}.")
    over = leaks > 0 and last.kind is not Kind.LEAKING
    if over and leak is not None:
        lines += [f"Seen during the last leak: {f.message}" for f in leak.findings]
    summed = replace(last, details=(*lines, *last.details))
    if over:
        summed = replace(summed, was=State.LEAKING)
    # The port before was not notified either.
    return summed if port is None else replace(summed, port=port.port, old_port=None)


def notices(before: Memory, after: Memory, events: Sequence[Event], *, caught_up: bool) -> tuple[Memory, list[Notice]]:
    """The notices of the step from `before` to `after`, and the memory with what they notify.

    A leak is always notified, even one that a replay shows to be over. All else depends on the state once the agent has
    `caught_up`: a replayed outage of an hour is one notice, not one for each change.
    """
    out: list[Notice] = []
    notified, outage = after.told, _outage(before, events)
    for event in events:
        if isinstance(event, StateChanged) and event.new is State.LEAKING and notified is not State.LEAKING:
            out.append(Notice(kind=Kind.LEAKING, at=event.at, began=event.at, findings=event.findings))
            notified = State.LEAKING
    was_well = after.was_protected or any(isinstance(e, StateChanged) and e.old is State.PROTECTED for e in events)
    state, exit_ = after.state, after.exit4 or after.exit6
    # Only one IP version's address is notified; when the other version's shows first, nothing has changed.
    known = after.told_exit if after.told_exit and exit_ and after.told_exit.version == exit_.version else exit_
    # About to recover: what a replay shows now is notified with the recovery, not as new trouble.
    recovering = after.candidate is not None and after.candidate.state is State.PROTECTED
    if (
        caught_up
        and state is not notified
        and state is not State.PENDING
        and not recovering
        and not _is_home_outage(after)
    ):
        notice = _state_notice(after, notified, outage, again=was_well)
        left = notified is State.LEAKING and notice.kind is not Kind.RECOVERED
        out.append(replace(notice, was=State.LEAKING) if left else notice)
        notified = state
    elif caught_up and state is State.PROTECTED and after.candidate is None and exit_ != known:
        changed = [e.at for e in events if isinstance(e, ExitChanged)]
        at = changed[-1] if changed else after.seen_at
        out.append(Notice(kind=Kind.ADDRESS_CHANGED, at=at, began=at, findings=after.findings))
    out = [
        replace(n, exit=exit_, old_exit=known if exit_ != known else None, findings=_findings_to_show(n)) for n in out
    ]
    told_exit = exit_ if out else known
    told_port = after.told_port
    if caught_up and after.port != told_port:
        if told_port is not None:
            changed = [e.at for e in events if isinstance(e, PortChanged)]
            at = changed[-1] if changed else after.seen_at
            out.append(Notice(kind=Kind.PORT_CHANGED, at=at, began=at, exit=exit_, port=after.port, old_port=told_port))
        told_port = after.port
    if notified in _NO_TROUBLE and state in _NO_TROUBLE:
        outage = None
    is_protected = was_well or notified is State.PROTECTED
    now = replace(
        after, told=notified, told_exit=told_exit, was_protected=is_protected, outage=outage, told_port=told_port
    )
    return (after if now == after else now), out


def _is_home_outage(memory: Memory) -> bool:
    """Whether it is down because the home connection is: the reference agent's notice covers all tunnels of the
    site.
    """
    return memory.state is State.DOWN and any(
        f.code is Code.UPLINK_DOWN and f.evidence.get("reference") == "down" for f in memory.findings
    )


def _findings_to_show(notice: Notice) -> tuple[Finding, ...]:
    """The findings that a notice shows. Warnings that are no trouble, e.g. an open kill switch, come once, on
    connecting.

    Containment is shown with the trouble that caused it. That protection rests on a setting alone is shown wherever a
    tunnel is called protected. Other information is only on the pages.
    """
    if notice.kind is Kind.CONNECTED or notice.first:
        return tuple(
            f for f in notice.findings if MEANING[f.code].severity is not Severity.INFO or f.code is Code.TUNNEL_UNSEEN
        )
    trouble = notice.kind in _KIND_OF.values()
    return tuple(
        f
        for f in notice.findings
        if MEANING[f.code].state is not State.PROTECTED or f.code is (Code.CONTAINED if trouble else Code.TUNNEL_UNSEEN)
    )


def _state_notice(after: Memory, notified: State, outage: Outage | None, *, again: bool) -> Notice:
    """The notice of the present state, where `notified` is the last notified state; `again`: it was protected
    before.
    """
    if after.state is not State.PROTECTED:
        return Notice(kind=_KIND_OF[after.state], at=after.since, began=after.since, findings=after.findings)
    if notified is State.PENDING or outage is None or not (again or outage.worst in _OBSERVED_TROUBLE):
        # An agent that was started before its tunnel: nothing recovers, and what could not be seen was no outage.
        return Notice(kind=Kind.CONNECTED, at=after.since, findings=after.findings)
    # A silence that a replay made void did not end with a change of state, but when the agent reported again.
    at = after.since if after.since > outage.began else max(after.seen_at, outage.began)
    return Notice(
        kind=Kind.RECOVERED, at=at, began=outage.began, was=outage.worst, first=not again, findings=after.findings
    )


def _outage(before: Memory, events: Sequence[Event]) -> Outage | None:
    """The trouble so far; a replay may correct when it began and how bad it was."""
    known = [before.outage] if before.outage else []
    if before.trouble_since is not None:
        known.append(Outage(began=before.trouble_since, worst=before.state))
    known += [
        Outage(began=e.at, worst=e.new) for e in events if isinstance(e, StateChanged) and e.new is not State.PROTECTED
    ]
    if not known:
        return None
    return Outage(began=min(o.began for o in known), worst=min((o.worst for o in known), key=HARM.index))
