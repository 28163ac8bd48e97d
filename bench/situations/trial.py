"""How a row is tried: a fault, the verdict, the message, quiet, and back to health. Times by the stored record."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.situations.posts import Frame, Post
from lab import until

RECOVERY = 75.0  # seconds until a healed tunnel must be told as well again


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table, or a part of it.

    `codes` must be among the findings, with one at least of `one_of` where there are any; `never` must not show at any
    time. `told` is a word of the only message; None means that nobody hears a thing. `limit` is how long the verdict is
    waited for, `quiet` how long nothing else may happen afterwards; `median` and `worst` are the promised seconds from
    fault to verdict, by `without_watch` where the agent has no capability. `rest` seconds pass before a trial, so that
    the rechecks after the last one are over. A row that needs the leak watch `needs_watch`. `lacks` tells why this
    machine cannot try the row, or "". `way` runs one trial.
    """

    number: int
    post: str
    title: str
    state: str
    way: "Way"
    part: str = ""
    codes: frozenset[str] = frozenset()
    one_of: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    passing: frozenset[str] = frozenset()
    told: str | None = None
    prepare: Callable[[Post], object] | None = None
    fault: Callable[[Post], object] | None = None
    check: Callable[[Post], str | None] | None = None
    limit: float = 20.0
    quiet: float = 3.0
    rest: float = 0.0
    median: float | None = None
    worst: float | None = None
    without_watch: float | None = None
    needs_watch: bool = False
    lacks: Callable[[], str] = str
    opens: bool = False  # the repair itself opens a way out for a moment: a leak on the way back is no complaint
    kinds: tuple[str, ...] = ("wireguard", "openvpn")
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.number}{self.part}"


@dataclass(kw_only=True)
class Trial:
    """What one repeat gave. Seconds count from the moment before the fault was called; None where nothing came."""

    complaints: list[str] = field(default_factory=list)
    fault_took: float | None = None
    verdict: float | None = None
    message: float | None = None
    message_after_verdict: float | None = None
    recovered: float | None = None
    seen: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return not self.complaints


@dataclass
class Result:
    """All repeats of one row on one kind of tunnel."""

    row: Row
    kind: str
    trials: list[Trial] = field(default_factory=list)


Way = Callable[[Row, Post], Trial]


def by_fault(row: Row, post: Post) -> Trial:
    """A fault moves the tunnel to another state, and one message tells it; healed, one more tells that it is over."""
    trial = Trial()
    began = _strike(row, post, trial)

    def right(seen: Frame) -> bool:
        either = not row.one_of or bool(row.one_of & seen.codes)
        return seen.state == row.state and row.codes <= seen.codes and either

    found = post.ear.wait(began, right, row.limit)
    if found is None:
        trial.complaints.append(f"no {row.state} {_list(row.codes)} within {row.limit:g} s: {post.brief()}")
    else:
        trial.verdict = _verdict_at(row, post, began, found) - began
    _hear(row, post, trial, began)
    _stay(row, post, trial, began)
    trial.complaints += _asked(row, post)
    _recover(row, post, trial)
    return trial


def by_watching(row: Row, post: Post) -> Trial:
    """With a fault or without: the state stays, the codes are there in the end, and nobody hears a thing."""
    trial = Trial()
    began = _strike(row, post, trial) if row.fault else time.time()
    if row.codes:
        missing = row.codes - post.now().codes
        found = post.ear.wait(began, lambda f: row.codes <= f.codes, row.limit if missing else 0.0)
        if missing and found is None:
            trial.complaints.append(f"no {_list(row.codes)} within {row.limit:g} s: {post.brief()}")
        if found is not None and row.fault:
            trial.verdict = found.time - began
    _stay(row, post, trial, began)
    end = post.now()
    if end.state not in {row.state, *row.passing}:
        trial.complaints.append(f"is {post.brief()}")
    if heard := post.heard(began):
        trial.complaints.append(f"told {[m['plain'][:60] for m in heard]}")
    trial.complaints += _asked(row, post)
    if row.fault:
        _recover(row, post, trial)
    return trial


def by_message(row: Row, post: Post) -> Trial:
    """The state stays; one message tells what changed. The verdict is the moment when the server showed the change."""
    trial = Trial()
    was = post.now().body
    began = _strike(row, post, trial)

    def changed(seen: Frame) -> bool:
        shown = ("exit", "forwarded_port")
        moved = any(seen.body.get(k) != was.get(k) for k in shown)
        return seen.state == row.state and row.codes <= seen.codes and moved

    found = post.ear.wait(began, changed, row.limit)
    if found is None:
        trial.complaints.append(f"no change shown within {row.limit:g} s: {post.brief()}")
    else:
        trial.verdict = found.time - began
    _hear(row, post, trial, began)
    _stay(row, post, trial, began)
    trial.complaints += _asked(row, post)
    _recover(row, post, trial)
    return trial


def by_replay(row: Row, post: Post) -> Trial:
    """A fault that leaves no way to the server: *silent* is told, and after the repair the history says what it was."""
    trial = Trial()
    began = _strike(row, post, trial)
    silent = post.ear.wait(began, lambda f: f.state == "silent", row.limit)
    if silent is None:
        trial.complaints.append(f"not silent within {row.limit:g} s: {post.brief()}")
    else:
        trial.verdict = _verdict_at(row, post, began, silent) - began
    _hear(row, post, trial, began)
    time.sleep(row.quiet)
    _recover(row, post, trial)
    moved = [m for m in post.history() if post.seconds(m["at"]) >= began - 1]
    known = next((m for m in moved if m["new"] == "down"), None)
    if known is None:
        trial.complaints.append(f"the replay tells no down: {[m['new'] for m in moved]}")
    else:
        codes = {f["code"] for f in known["findings"]}
        if not row.codes <= codes:
            trial.complaints.append(f"the replay says {_list(codes)}")
        if abs(post.seconds(known["at"]) - began) > 4:
            trial.complaints.append(f"dated {post.seconds(known['at']) - began:+.1f} s from the fault")
    return trial


# --- parts of a trial ---


def _strike(row: Row, post: Post, trial: Trial) -> float:
    """Apply the fault; returns when it began, in seconds since the epoch."""
    assert row.fault is not None
    if row.prepare is not None:
        row.prepare(post)
    began = time.time()
    row.fault(post)
    trial.fault_took = time.time() - began
    return began


def _verdict_at(row: Row, post: Post, began: float, found: Frame) -> float:
    """When the server decided: the record of the transition, or the event where codes came without one."""
    for move in post.moves(began):
        if move["new"] == found.state and (row.codes <= {f["code"] for f in move["findings"]} or row.way is by_replay):
            return post.seconds(move["decided_at"])
    return found.time


def _hear(row: Row, post: Post, trial: Trial, began: float) -> None:
    """Wait for the message and take its time of arrival."""
    if row.told is None:
        return
    word = row.told
    patience = 5.0 if trial.verdict is not None else 1.0

    def arrived() -> Mapping[str, Any] | None:
        return next((m for m in post.heard(began) if word in m["plain"].lower()), None)

    try:
        first = until(arrived, patience, "a message", interval=0.05)
    except TimeoutError:
        trial.complaints.append(f"no message with {word!r}: {[m['plain'][:60] for m in post.heard(began)]}")
        return
    assert first is not None
    trial.message = float(first["time"]) - began
    if trial.verdict is not None:
        # Where a further finding came after the state, the message followed the state.
        decided = [post.seconds(m["decided_at"]) - began for m in post.moves(began) if m["new"] == row.state]
        trial.message_after_verdict = trial.message - min([trial.verdict, *decided])


def _stay(row: Row, post: Post, trial: Trial, began: float) -> None:
    """For `quiet` seconds nothing else happens; then all that happened since the fault is looked at."""
    time.sleep(row.quiet)
    allowed = {row.state, *row.passing}
    for move in post.moves(began):
        codes = frozenset(f["code"] for f in move["findings"])
        at = post.seconds(move["decided_at"]) - began
        trial.seen.append(f"{at:.2f} s {move['new']} {_list(codes)}")
        if move["new"] not in allowed:
            trial.complaints.append(f"{move['new']} ({_list(codes)}) at {at:.2f} s: {_why(move)}")
        if bad := codes & row.never:
            trial.complaints.append(f"{_list(bad)} at {at:.2f} s")
    for seen in post.ear.since(began):
        if bad := seen.codes & row.never:
            trial.complaints.append(f"{_list(bad)} shown at {seen.time - began:.2f} s")
            break
    heard = post.heard(began)
    trial.told = [m["plain"].splitlines()[0][:80] for m in heard]
    if row.told is not None and len(heard) > 1:
        trial.complaints.append(f"{len(heard)} messages: {trial.told}")


def _recover(row: Row, post: Post, trial: Trial) -> None:
    """Heal, and wait until the server says so. No leak may be told on the way back that the fault was not."""
    healed = time.time()
    post.heal()
    try:
        post.at_rest(RECOVERY)
    except TimeoutError as e:
        trial.complaints.append(f"no recovery: {e}")
        return
    trial.recovered = time.time() - healed
    for move in post.moves(healed):
        if move["new"] == "leaking" and row.state != "leaking" and not row.opens:
            codes = _list({f["code"] for f in move["findings"]})
            at = post.seconds(move["decided_at"]) - healed
            trial.complaints.append(f"leaking ({codes}) {at:.1f} s after the repair: {_why(move)}")


def _asked(row: Row, post: Post) -> list[str]:
    complaint = row.check(post) if row.check is not None else None
    return [complaint] if complaint else []


def _why(move: Mapping[str, Any]) -> str:
    """The first finding's words and facts."""
    return " ".join(f"{f['message']} {f['evidence']}" for f in move["findings"][:1])


def _list(codes: Iterable[str]) -> str:
    return ", ".join(sorted(codes))
