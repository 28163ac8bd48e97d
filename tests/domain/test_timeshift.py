"""What is remembered of times that have not come yet, after a clock was set back."""

from dataclasses import replace
from ipaddress import ip_network

from vpn_sentinel.domain.machine import Before, Candidate, Home, Memory, Outage
from vpn_sentinel.domain.timeshift import TOLERATED, not_after
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
    known = Memory(state=State.PROTECTED, since=NOW, seen_at=NOW + TOLERATED)
    assert not_after(known, NOW) is known
