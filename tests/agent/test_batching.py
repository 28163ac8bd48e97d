from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ManualClock
from vpn_sentinel.agent.spool.spool import Spool
from vpn_sentinel.agent.uplink.batching import MAX_CHUNK, Batching
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.wire import codec

BODY = codec.encode(Observation(trigger=Trigger.TIMER))


@pytest.fixture
def spool(tmp_path: Path, clock: ManualClock) -> Iterator[Spool]:
    made = Spool(tmp_path / "agent.sqlite", clock)
    yield made
    made.close()


def fill(spool: Spool, count: int) -> None:
    for _ in range(count):
        spool.append(BODY, routine=True)


def test_reports_carry_their_age(spool: Spool, clock: ManualClock) -> None:
    fill(spool, 2)
    clock.now += 5
    load = Batching(spool, 3.0)
    reports = load.reports(1)
    assert [(r.seq, r.age) for r in reports] == [(2, 5.0)]
    assert load.still_pending(reports) == 1


def test_what_cannot_be_read_is_given_up(spool: Spool) -> None:
    spool.append(b"{}", routine=False)
    fill(spool, 1)
    assert [r.seq for r in Batching(spool, 3.0).reports(0)] == [2]
    assert spool.thinned == 1


def test_what_can_have_been_sent_is_what_was_there_before_and_what_was_taken(spool: Spool) -> None:
    fill(spool, 3)
    load = Batching(spool, 3.0)
    assert load.max_sent_seq == 3
    fill(spool, 2)
    assert load.max_sent_seq == 3
    load.reports(0)
    assert load.max_sent_seq == 5


def test_a_slow_server_gets_less_and_more_time(spool: Spool) -> None:
    fill(spool, MAX_CHUNK)
    load = Batching(spool, 3.0)
    load.overdue()
    assert (len(load.reports(0)), load.answer_timeout_s) == (MAX_CHUNK // 2, 6.0)
    for _ in range(10):
        load.overdue()
    assert (len(load.reports(0)), load.answer_timeout_s) == (1, 24.0)
    load.stored()
    assert (len(load.reports(0)), load.answer_timeout_s) == (2, 3.0)


def test_a_report_that_is_never_taken_is_found_and_given_up(spool: Spool) -> None:
    fill(spool, 10)
    load = Batching(spool, 3.0)
    poisoned = 3
    for _ in range(100):
        reports = load.reports(0)
        if not reports:
            break
        if any(r.seq == poisoned for r in reports):
            load.refused(reports, "no")
        else:
            spool.forget(reports[-1].seq)
            load.stored()
    assert (spool.pending, spool.thinned) == (0, 1)
    load.refused([], "no")
