"""Which remedy is due, by the verdicts and the clock. Pure: the caller loads and saves what must survive a restart.

A remedy waits until its trouble has lasted long enough. Then it runs once (a command, a pause) or repeatedly (a
restart), each time after a longer wait, and at most so many times an hour. *Unknown* starts none and ends every wait.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel.domain.counted import counted
from vpn_sentinel.domain.verdict import Code, State, Verdict

MIN_RETRY_S: Final = 60.0  # from one try to the next; it doubles …
MAX_RETRY_S: Final = 3600.0  # … up to this
CAP_WINDOW_S: Final = 3600.0
_SERIES_GAP_S: Final = 2 * CAP_WINDOW_S  # tries further apart than this begin a new series
_MAX_TRIES: Final = 24  # remembered of each remedy
# What a restart of the tunnel can repair; not an outage of the home line, a captive portal, a missing network.
CURABLE: Final = frozenset({Code.TUNNEL_DOWN, Code.NO_TRAFFIC, Code.NO_FORWARDING})
ACTED_ON: Final = frozenset({State.LEAKING, State.DOWN, State.DEGRADED, State.PROTECTED})


@dataclass(frozen=True, slots=True, kw_only=True)
class RemedyRules:
    """What is switched on. `clients` are names of torrent clients; `cap` is runs an hour.

    The other values are seconds that a state must have lasted: for a restart, for a pause, and (`settled`) for the
    command and for resuming.
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
    """What survives a restart of the agent: when each remedy was tried (seconds since the epoch), the state that the
    command was last run for, and the clients that the agent paused.
    """

    tries: dict[str, list[float]] = field(default_factory=dict)
    last_notified: State | None = None
    paused: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        return json.dumps({"tries": self.tries, "told": self.last_notified, "paused": self.paused})

    @classmethod
    def from_text(cls, text: str | None) -> "RemedyMemory":
        """Text that cannot be read gives an empty memory."""
        try:
            found = json.loads(text or "{}")
            last_notified = found.get("told")
            return cls(
                tries={str(k): [float(t) for t in v] for k, v in found.get("tries", {}).items()},
                last_notified=State(last_notified) if last_notified else None,
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
    def __init__(self, wants: RemedyRules, memory: RemedyMemory) -> None:
        self.memory = memory
        self._wants = wants
        self._state: State | None = None
        self._since = 0.0
        self._curable_since: float | None = None
        self._done: set[str] = set()  # keys, since the present state began
        self._logged: set[str] = set()

    def due(self, verdict: Verdict, now: float, wall: float) -> tuple[Step, ...]:
        """The steps that this verdict asks for; `now` is monotonic, `wall` is seconds since the epoch.

        A step that must wait is returned once, and again when it may run or the state has changed.
        """
        if verdict.state not in ACTED_ON:
            self._state = self._curable_since = None
            return ()
        if verdict.state is not self._state:
            self._state, self._since = verdict.state, now
            self._done.clear()
            self._logged.clear()
        curable = verdict.state is State.DOWN and any(f.code in CURABLE for f in verdict.findings)
        self._curable_since = (self._curable_since if self._curable_since is not None else now) if curable else None
        steps = []
        for step in self._asked_for(now):
            held = self._wait_reason(step.key, wall)
            if held is None:
                self._logged.discard(step.key)
                steps.append(step)
            elif step.key not in self._logged:
                self._logged.add(step.key)
                steps.append(Step(step.name, step.key, step.client, held))
        return tuple(steps)

    def tried(self, step: Step, wall: float) -> None:
        """Count a step that begins, whatever its result."""
        tries = self.memory.tries.setdefault(step.key, [])
        tries.append(wall)
        del tries[:-_MAX_TRIES]

    def ended(self, step: Step, *, well: bool, dry: bool = False) -> None:
        """Take a step's end. One that failed is due again after its wait, as long as the state lasts."""
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
                self.memory.last_notified = state  # no change: it was protected at the first round
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

    def _wait_reason(self, key: str, wall: float) -> str | None:
        # Tries in the future do not count: after a clock was set back they would block the remedy.
        tries = [t for t in self.memory.tries.get(key, ()) if t <= wall]
        if not tries:
            return None
        if sum(wall - t < CAP_WINDOW_S for t in tries) >= self._wants.cap:
            return f"{counted(self._wants.cap, 'time')} within an hour is the most"
        series = 1
        for later, earlier in zip(reversed(tries), reversed(tries[:-1]), strict=False):
            if later - earlier > _SERIES_GAP_S:
                break
            series += 1
        wait = min(MAX_RETRY_S, MIN_RETRY_S * 2 ** (series - 1))
        return f"not before {wait:.0f} s after the last time" if wall - tries[-1] < wait else None
