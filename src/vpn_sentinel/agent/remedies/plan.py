"""Which remedy is due, by the verdicts and the clock. Pure: what it remembers over restarts is handed in and out.

A remedy waits until its trouble has lasted, then runs once (a command, a pause) or again and again (a restart), each
time after a longer wait and never more than so often an hour. *Unknown* starts none and ends every wait.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel.domain.counted import counted
from vpn_sentinel.domain.verdict import Code, State, Verdict

FIRST_WAIT: Final = 60.0  # seconds from one try to the next, doubling …
LONGEST_WAIT: Final = 3600.0  # … up to this
HOUR: Final = 3600.0
_STREAK: Final = 2 * HOUR  # tries further apart than this are not one row of tries
_KEPT: Final = 24  # tries remembered of each remedy
# What a restart of the tunnel can cure; not the home line, a portal, a network that is gone.
CURABLE: Final = frozenset({Code.TUNNEL_DOWN, Code.NO_TRAFFIC, Code.NO_FORWARDING})
TELLING: Final = frozenset({State.LEAKING, State.DOWN, State.DEGRADED, State.PROTECTED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """What is switched on. `clients` are torrent clients by name; `cap` is times an hour.

    Times are seconds that a state must have lasted: for a restart, for a pause, and (`settled`) for the command and for
    resuming.
    """

    hook: bool = False
    restart: bool = False
    clients: tuple[str, ...] = ()
    resume: bool = False
    restart_after: float = 30.0
    pause_after: float = 0.0
    settled: dict[State, float] = field(default_factory=dict)
    cap: int = 3


@dataclass(slots=True)
class RemedyMemory:
    """What outlives a restart: when each remedy was tried (seconds since the epoch), the state that the command was
    told last, and the clients that we paused.
    """

    tries: dict[str, list[float]] = field(default_factory=dict)
    last_notified: State | None = None
    paused: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        return json.dumps({"tries": self.tries, "told": self.last_notified, "paused": self.paused})

    @classmethod
    def from_text(cls, text: str | None) -> "RemedyMemory":
        """What cannot be read is an empty memory."""
        try:
            found = json.loads(text or "{}")
            told = found.get("told")
            return cls(
                tries={str(k): [float(t) for t in v] for k, v in found.get("tries", {}).items()},
                last_notified=State(told) if told else None,
                paused=[str(c) for c in found.get("paused", ())],
            )
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return cls()


@dataclass(frozen=True, slots=True)
class Step:
    """One remedy that is due. `key` counts its tries; `held` says why it must wait, None when it may run now."""

    name: str
    key: str
    client: str = ""
    held: str | None = None


class Plan:
    def __init__(self, wants: Wants, memory: RemedyMemory) -> None:
        self.memory = memory
        self._wants = wants
        self._state: State | None = None
        self._since = 0.0
        self._curable_since: float | None = None
        self._done: set[str] = set()  # of the present stretch of one state
        self._said: set[str] = set()

    def due(self, verdict: Verdict, now: float, wall: float) -> tuple[Step, ...]:
        """The steps that this verdict asks for; `now` never jumps, `wall` is seconds since the epoch.

        A step that is held comes once, until it may run or the state changes.
        """
        if verdict.state not in TELLING:
            self._state = self._curable_since = None
            return ()
        if verdict.state is not self._state:
            self._state, self._since = verdict.state, now
            self._done.clear()
            self._said.clear()
        curable = verdict.state is State.DOWN and any(f.code in CURABLE for f in verdict.findings)
        self._curable_since = (self._curable_since if self._curable_since is not None else now) if curable else None
        steps = []
        for step in self._asked_for(now):
            held = self._held(step.key, wall)
            if held is None:
                self._said.discard(step.key)
                steps.append(step)
            elif step.key not in self._said:
                self._said.add(step.key)
                steps.append(Step(step.name, step.key, step.client, held))
        return tuple(steps)

    def tried(self, step: Step, wall: float) -> None:
        """A step begins: it counts, however it ends."""
        tries = self.memory.tries.setdefault(step.key, [])
        tries.append(wall)
        del tries[:-_KEPT]

    def ended(self, step: Step, *, well: bool, dry: bool = False) -> None:
        """A step has ended. One that failed is due again after its wait, as long as the state lasts."""
        if not well:
            return
        self._done.add(step.key)
        if step.name == "hook":
            self.memory.last_notified = State(step.key.removeprefix("hook."))
        elif step.name.endswith("_pause") and not dry and step.client not in self.memory.paused:
            self.memory.paused.append(step.client)
        elif step.name.endswith("_resume") and step.client in self.memory.paused:
            self.memory.paused.remove(step.client)

    def _asked_for(self, now: float) -> Iterator[Step]:
        state, lasted, wants = self._state, now - self._since, self._wants
        if state is None:
            return
        if wants.hook and state is not self.memory.last_notified and lasted >= wants.settled.get(state, 0.0):
            if self.memory.last_notified is None and state is State.PROTECTED:
                self.memory.last_notified = state  # nothing changed: it was well when we first looked
            elif f"hook.{state}" not in self._done:
                yield Step("hook", f"hook.{state}")
        names: tuple[str, ...] = ()
        if state is State.LEAKING and lasted >= wants.pause_after:
            names = tuple(f"{client}_pause" for client in wants.clients)
        elif state is State.PROTECTED and wants.resume and lasted >= wants.settled.get(state, 0.0):
            names = tuple(f"{client}_resume" for client in self.memory.paused)
        yield from (Step(name, name, name.rpartition("_")[0]) for name in names if name not in self._done)
        if wants.restart and self._curable_since is not None and now - self._curable_since >= wants.restart_after:
            yield Step("gluetun_restart", "gluetun_restart")

    def _held(self, key: str, wall: float) -> str | None:
        # A wall clock that was set back would hold a remedy for ever: tries of the future do not count.
        tries = [t for t in self.memory.tries.get(key, ()) if t <= wall]
        if not tries:
            return None
        if sum(wall - t < HOUR for t in tries) >= self._wants.cap:
            return f"{counted(self._wants.cap, 'time')} within an hour is the most"
        row = 1
        for later, earlier in zip(reversed(tries), reversed(tries[:-1]), strict=False):
            if later - earlier > _STREAK:
                break
            row += 1
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (row - 1))
        return f"not before {wait:.0f} s after the last time" if wall - tries[-1] < wait else None
