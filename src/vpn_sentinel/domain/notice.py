"""What people are told, and when: decided from what they were told last, so no DOWN without its UP and the reverse."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from vpn_sentinel.domain.machine import Event, ExitChanged, Memory, Moved
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.domain.verdict import HARM, Finding, State


class Kind(StrEnum):
    SERVER_STARTED = "server_started"
    CONNECTED = "connected"
    ADDRESS_CHANGED = "address_changed"
    LEAKING = "leaking"
    DOWN = "down"
    DEGRADED = "degraded"
    SILENT = "silent"
    RECOVERED = "recovered"
    TEST = "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One thing to tell. Times are seconds since the epoch; `began` is when the trouble began or the change was seen.

    `was` is, for a recovery, the worst that the outage was; `truth` tells what a replay made of a silence.
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
    details: tuple[str, ...] = field(default_factory=tuple)

    @property
    def outage(self) -> float | None:
        """Length in seconds of the trouble that a recovery ends."""
        return self.at - self.began if self.kind is Kind.RECOVERED and self.began is not None else None


_KIND_OF = {
    State.LEAKING: Kind.LEAKING,
    State.DOWN: Kind.DOWN,
    State.DEGRADED: Kind.DEGRADED,
    State.SILENT: Kind.SILENT,
}


def notices(before: Memory, after: Memory, events: Sequence[Event], *, caught_up: bool) -> tuple[Memory, list[Notice]]:
    """What the step from `before` to `after` gives people to hear, and the memory that knows they heard it.

    A leak is always told, even one that a replay shows to be over. All else is told by where the tunnel stands once
    the agent has `caught_up`: a replayed outage of an hour is one message, not each of its turns.
    """
    out: list[Notice] = []
    told = after.told
    for event in events:
        if isinstance(event, Moved) and event.new is State.LEAKING and told is not State.LEAKING:
            out.append(Notice(kind=Kind.LEAKING, at=event.at, began=event.at, findings=event.findings))
            told = State.LEAKING
    if not caught_up:
        return replace(after, told=told), out
    state, exit_ = after.state, after.exit4 or after.exit6
    # On its way back: what a replay brings to light now is told with the recovery, not as fresh trouble.
    recovering = after.candidate is not None and after.candidate.state is State.PROTECTED
    if state is not told and state is not State.PENDING and not recovering:
        if state is State.PROTECTED:
            kind = Kind.CONNECTED if told is State.PENDING else Kind.RECOVERED
            began = _trouble_began(before, events)
            out.append(
                Notice(
                    kind=kind, at=after.since, began=began, was=_worst(before, events, told), findings=after.findings
                )
            )
        else:
            out.append(Notice(kind=_KIND_OF[state], at=after.since, began=after.since, findings=after.findings))
        told = state
    elif state is State.PROTECTED and after.candidate is None and after.told_exit and exit_ != after.told_exit:
        changed = [e for e in events if isinstance(e, ExitChanged)]
        at = changed[-1].at if changed else after.seen_at
        out.append(Notice(kind=Kind.ADDRESS_CHANGED, at=at, began=at, findings=after.findings))
    out = [replace(n, exit=exit_, old_exit=after.told_exit if exit_ != after.told_exit else None) for n in out]
    return replace(after, told=told, told_exit=exit_ if out or not after.told_exit else after.told_exit), out


def _trouble_began(before: Memory, events: Sequence[Event]) -> float | None:
    """When the trouble that is now over began: a replay may know better than the silence did."""
    moves = [e.at for e in events if isinstance(e, Moved) and e.new is not State.PROTECTED]
    starts = [t for t in (before.trouble_since, *moves) if t is not None]
    return min(starts, default=None)


def _worst(before: Memory, events: Sequence[Event], told: State) -> State:
    seen = {told, before.state, *(e.new for e in events if isinstance(e, Moved))} - {State.PROTECTED, State.PENDING}
    return min(seen, key=HARM.index, default=told)
