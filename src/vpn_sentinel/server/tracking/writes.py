"""Gathers by statement what one transaction of the tracker writes."""

from dataclasses import dataclass, field

from vpn_sentinel.domain.machine import Event, Revised, StateChanged
from vpn_sentinel.domain.observation import Observation
from vpn_sentinel.domain.verdict import HARM, State, Verdict
from vpn_sentinel.server.store import rows
from vpn_sentinel.server.store.outbox_rows import ADD_DELIVERY
from vpn_sentinel.server.store.store import Batch, TunnelRow
from vpn_sentinel.wire import limits
from vpn_sentinel.wire.codec import encode, encode_observation


@dataclass(slots=True)
class Writes:
    """The rows to write, by statement; `state_changes`, by tunnel's name, are to be logged after the commit."""

    tunnels: dict[int, TunnelRow] = field(default_factory=dict)
    touched: dict[int, TunnelRow] = field(default_factory=dict)
    observations: list[tuple[object, ...]] = field(default_factory=list)
    ordered: list[Batch] = field(default_factory=list)
    deliveries: list[tuple[object, ...]] = field(default_factory=list)
    actions: list[tuple[object, ...]] = field(default_factory=list)
    state_changes: list[tuple[str, StateChanged | Revised]] = field(default_factory=list)

    def add_observation(
        self, tunnel: int, spool: str, seq: int, at: float, received_at: float, verdict: Verdict, seen: Observation
    ) -> None:
        """Add one observation, and the agent's actions in it."""
        body = encode_observation(seen).decode()
        self.observations.append((tunnel, spool, seq, at, received_at, verdict.state.value, body))
        self.actions += [
            (tunnel, at - min(a.age, limits.MAX_REPORT_AGE_S), a.name, a.outcome.value, a.detail) for a in seen.actions
        ]

    def batches(self) -> list[Batch]:
        """The statements with their rows, in the order in which they have to run."""
        found: list[Batch] = [
            (rows.SAVE_TUNNEL, [rows.saved_tunnel(t) for t in self.tunnels.values()]),
            (rows.TOUCH_TUNNEL, [rows.touched_tunnel(t) for i, t in self.touched.items() if i not in self.tunnels]),
            (rows.ADD_OBSERVATION, self.observations),
            *self.ordered,
            (rows.ADD_ACTION, self.actions),
            (ADD_DELIVERY, self.deliveries),
        ]
        return [b for b in found if b[1]]


def record(tunnel: int, event: Event, now: float, writes: Writes) -> None:
    """Add an event's transition, and its effect on the tunnel's incident."""
    match event:
        case Revised():
            writes.ordered.append((rows.VOID_SILENCE, [(tunnel, event.at)]))
            # An incident that only the silence opened is removed; one that was open before stays open.
            writes.ordered.append((rows.VOID_INCIDENT, [(tunnel, event.at)]))
        case StateChanged():
            findings = encode(event.findings).decode()
            transition = (tunnel, event.at, now, event.old.value, event.new.value, findings)
            writes.ordered.append((rows.ADD_TRANSITION, [transition]))
            if event.new is State.PROTECTED:
                writes.ordered.append((rows.CLOSE_INCIDENT, [(event.at, tunnel)]))
            elif event.old in (State.PROTECTED, State.PENDING):
                writes.ordered.append((rows.OPEN_INCIDENT, [(tunnel, event.at, event.new.value, findings)]))
            elif HARM.index(event.new) < HARM.index(event.old):
                writes.ordered.append((rows.WORSEN_INCIDENT, [(event.new.value, findings, tunnel)]))
