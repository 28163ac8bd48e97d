"""What is remembered goes with a clock that is set, and nothing of times that have not come yet."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from ipaddress import ip_network

from vpn_sentinel.domain.machine import Before, Candidate, Home, Memory, Outage
from vpn_sentinel.domain.timeshift import TOLERATED_S, moved, not_after
from vpn_sentinel.domain.verdict import State

NOW = 1_800_000_000.0
LATER = NOW + 3600
MEMORY = Memory(
    state=State.DOWN, since=LATER, seen_at=LATER + 5, candidate=Candidate(state=State.PROTECTED, since=LATER),
    trouble_since=NOW - 10, outage=Outage(began=LATER, worst=State.DOWN), turns=(NOW - 5, LATER), blinks=(LATER,),
    port_checked_at=LATER, unheard_since=LATER, homes=(Home(network=ip_network("198.51.100.7"), seen_at=LATER),),
)  # fmt: skip


def test_nothing_is_remembered_of_the_future() -> None:
    assert not_after(MEMORY, NOW) == replace(
        MEMORY, since=NOW, seen_at=NOW, candidate=Candidate(state=State.PROTECTED, since=NOW),
        outage=Outage(began=NOW, worst=State.DOWN), turns=(NOW - 5, NOW), blinks=(NOW,), port_checked_at=NOW,
        unheard_since=NOW, homes=(Home(network=ip_network("198.51.100.7"), seen_at=NOW),),
    )  # fmt: skip


def test_a_silence_that_lies_in_the_future_stays_one() -> None:
    before = Before(state=State.PROTECTED, since=NOW, findings=(), candidate=None)
    found = not_after(Memory(state=State.SILENT, since=NOW + 60, seen_at=NOW - 30, before=before), NOW)
    assert (found.state, found.since, found.seen_at, found.before) == (State.SILENT, NOW, NOW - 30, None)


def test_clocks_of_servers_side_by_side_may_differ_a_little() -> None:
    known = Memory(state=State.PROTECTED, since=NOW, seen_at=NOW + TOLERATED_S)
    assert not_after(known, NOW) is known


def test_what_is_remembered_goes_with_the_clock() -> None:
    back = moved(MEMORY, -3600.0)
    assert back == replace(
        MEMORY, since=NOW, seen_at=NOW + 5, candidate=Candidate(state=State.PROTECTED, since=NOW),
        trouble_since=NOW - 3610, outage=Outage(began=NOW, worst=State.DOWN), turns=(NOW - 3605, NOW), blinks=(NOW,),
        port_checked_at=NOW, unheard_since=NOW, homes=(Home(network=ip_network("198.51.100.7"), seen_at=NOW),),
        moved=-3600.0,
    )  # fmt: skip
    assert moved(back, 3600.0) == MEMORY
    assert moved(MEMORY, 0.0) is MEMORY


# Of all else that is remembered the times are in `EVERY_TIME`: a new field goes here or there.
NO_TIMES = {
    "findings", "exit4", "exit6", "home", "told", "told_exit", "was_protected", "port", "told_port", "port_check",
    "working", "moved",
}  # fmt: skip
EVERY_TIME = replace(
    MEMORY, before=Before(state=State.DOWN, since=NOW, findings=(), candidate=Candidate(state=State.SILENT, since=NOW)),
    refuted=NOW,
)  # fmt: skip


def times(of: object) -> Iterator[float]:
    if isinstance(of, float):
        yield of
    elif isinstance(of, tuple):
        for one in of:
            yield from times(one)
    elif is_dataclass(of):
        for field in fields(of):
            if field.name != "moved":
                yield from times(getattr(of, field.name))


def test_no_time_is_forgotten() -> None:
    """Neither one that is new: what does not go with the clock is an hour off when it is set."""
    untold = {f.name for f in fields(Memory) if getattr(EVERY_TIME, f.name) == getattr(Memory(), f.name)}
    assert untold <= NO_TIMES
    assert list(times(moved(EVERY_TIME, 3600.0))) == [time + 3600 for time in times(EVERY_TIME)]
    assert max(times(not_after(EVERY_TIME, NOW))) == NOW


def test_never_stays_never() -> None:
    assert moved(Memory(), 3600.0) == Memory(moved=3600.0)


def test_a_silence_can_still_be_voided_by_a_replay() -> None:
    waiting = Candidate(state=State.DOWN, since=NOW)
    known = Before(state=State.PROTECTED, since=NOW, findings=(), candidate=waiting)
    found = moved(Memory(state=State.SILENT, since=NOW + 60, before=known), 3600.0)
    assert found.before == replace(known, since=LATER, candidate=replace(waiting, since=LATER))
    untold = moved(Memory(state=State.SILENT, since=NOW + 60, before=replace(known, candidate=None)), 3600.0)
    assert untold.before == replace(known, since=LATER, candidate=None)
