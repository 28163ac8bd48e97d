"""The bench of hours: what it makes of its figures, and the honest end of a tunnel that it plays."""

import asyncio
import random
from itertools import cycle, islice

import pytest

from bench.siege.attacks import frame
from bench.siege.endure import Minute, Peak, Phase, Run, growth, missed, page
from bench.siege.fleet import Histogram, Told, Window, unframed

PEAK = Peak(taken=3000.0, steady=2700.0, busy=0.97, idle=0.01, p99=0.04, rate=2160.0)


def phase(*times: float) -> Phase:
    took = Histogram()
    for seconds in times:
        took.add(seconds)
    return Phase(told=Told(seconds=20.0, made=len(times), worst=took.worst, took=took.steps()))


def run(memory: list[float], *, calm: float = 0.01, lost: int | None = 0) -> Run:
    attacks = islice(cycle(["chunks", "heads"]), len(memory))
    minutes = [
        Minute(attack=attack, under=phase(3.0), calm=phase(*[calm] * 100), memory=mb, most=mb + 10, descriptors=1030)
        for attack, mb in zip(attacks, memory, strict=True)
    ]
    return Run(began="2026-01-01 00:00", seconds=20.0, addresses=200, peak=PEAK, minutes=minutes, made=9, lost=lost)


def test_a_histogram_tells_shares_to_five_percent_and_the_worst_exactly() -> None:
    times = [random.Random(7).lognormvariate(-5, 1) for _ in range(20_000)]
    took = Histogram()
    for seconds in times:
        took.add(seconds)
    for share in (0.5, 0.99, 0.999):
        assert took.at(share) == pytest.approx(sorted(times)[int(share * len(times))], rel=0.06)
    assert took.at(1.0) == took.worst == max(times)
    assert len(took.steps()) < 300


def test_histograms_add_up_and_survive_being_written_down() -> None:
    quick, slow = phase(*[0.001] * 99), phase(7.0)
    whole = Histogram(quick.told.took, quick.told.worst)
    whole.take(slow.took)
    assert whole.at(0.98) == pytest.approx(0.001, rel=0.06)
    assert whole.at(1.0) == 7.0
    assert Histogram().at(0.99) == 0.0


async def test_what_is_not_answered_counts_with_all_the_time_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.siege.fleet.PATIENCE", 0.05)
    window = Window(3)
    for _ in range(2):
        window.make()
    window.acknowledged(window.began, window.began + 0.2)
    told = await window.told()
    assert (told.number, told.made, told.unanswered, told.slow) == (3, 2, 1, [0])
    assert told.worst == pytest.approx(0.2)


async def test_a_window_is_told_once_its_last_report_is_acknowledged() -> None:
    window = Window(0)
    window.make()
    telling = asyncio.get_running_loop().create_task(window.told())
    await asyncio.sleep(0)
    assert not telling.done()
    window.acknowledged(window.began, window.began + 0.01)
    told = await telling
    assert (told.unanswered, told.slow) == (0, [])
    assert told.worst == pytest.approx(0.01)


@pytest.mark.parametrize("payload", [b"", b"x" * 125, b"y" * 126, b"z" * 5000])
def test_frames_are_taken_one_by_one_as_they_come(payload: bytes) -> None:
    size = bytes([len(payload)]) if len(payload) < 126 else b"\x7e" + len(payload).to_bytes(2)
    data = b"\x81" + size + payload
    assert all(unframed(data[:end]) is None for end in range(len(data)))
    assert unframed(data + b"\x8a") == (1, payload, b"\x8a")
    assert frame(1, payload).endswith(bytes(4) + payload)  # a client's has a mask besides


def test_memory_that_swings_with_the_attacks_does_not_grow() -> None:
    swinging = [100.0, 140.0] * 20
    assert growth(swinging, 2) == (0.0, 0.0)
    assert missed(run(swinging)) == []


@pytest.mark.parametrize(
    "memory", [[100.0 + n for n in range(40)], [100.0] * 10 + [130.0] * 30], ids=["steadily", "once and for good"]
)
def test_memory_that_grows_is_told(memory: list[float]) -> None:
    more, _ = growth(memory, 2)
    assert more > 28.0
    assert any("memory grows" in what for what in missed(run(memory)))


def test_what_the_first_round_of_attacks_takes_is_no_growth() -> None:
    assert missed(run([100.0, 150.0] + [190.0] * 38)) == []


def test_of_growth_nothing_is_said_before_each_attack_came_three_times() -> None:
    short = run([100.0, 200.0, 300.0])
    assert missed(short) == []
    assert "too short to tell growth" in page(short)


def test_the_verdict_names_what_is_not_as_it_should_be() -> None:
    bad = run([100.0] * 8, calm=0.08, lost=3)
    bad.minutes[2].alarms = 1
    bad.minutes[3].moved = (1, 4.0)
    found = "; ".join(missed(bad))
    for what in ("p99 outside of attacks is 8", "reports were lost", "deadlines were moved", "false alarms"):
        assert what in found
    assert f"**Goals missed: {found}.**" in page(bad)
    assert "Goals missed: none" in page(run([100.0] * 8))


def test_reports_of_a_run_that_was_ended_are_not_called_lost() -> None:
    assert "not known: the run was ended before its time" in page(run([100.0] * 8, lost=None))


def test_the_page_says_who_was_too_slow_where_the_peak_was_looked_for() -> None:
    assert "at a steady 2,700 a second" in page(run([100.0]))
    idle = run([100.0])
    idle.peak = Peak(taken=3000.0, steady=None, busy=0.5, idle=0.4, p99=0.04, rate=4000.0)
    assert "who reports was too slow" in page(idle)
