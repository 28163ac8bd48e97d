import asyncio

from tests.agent.doubles import Loopback, udp
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.probes.canary import CanaryPlan, canaries
from vpn_sentinel.agent.probes.target_health import FLAKY_AFTER_ROUNDS, RECHECK_EVERY_ROUNDS, TargetHealth
from vpn_sentinel.domain.observation import Answer, Canary, Probe

ASKED = (("a", 4), ("b", 4), ("b", 6))


def said(*answers: tuple[str, int, Answer]) -> tuple[Canary, ...]:
    return tuple(Canary(probe=Probe.DEFAULT, target=t, family=f, answer=a) for t, f, a in answers)


GOOD = ("a", 4, Answer.ANSWERED)
SILENT = said(GOOD, ("b", 4, Answer.LOST))


def test_three_silences_in_a_row_make_one_flaky_until_it_answers() -> None:
    steady = TargetHealth()
    assert steady.saw(ASKED, said(GOOD)) == ()  # b was left out, which says nothing yet
    assert steady.suspects() == {("b", 4)}
    assert [steady.saw(ASKED, SILENT) for _ in range(FLAKY_AFTER_ROUNDS)] == [(), (), ("b",)]
    assert steady.saw(ASKED, said(GOOD)) == ("b",)
    assert steady.saw(ASKED, said(GOOD, ("b", 4, Answer.ANSWERED))) == ()
    assert steady.suspects() == set()


def test_when_all_of_a_family_are_silent_no_target_is_to_blame() -> None:
    steady = TargetHealth()
    for _ in range(5):
        assert steady.saw(ASKED, said(("a", 4, Answer.LOST), ("b", 4, Answer.LOST), ("b", 6, Answer.LOST))) == ()
        assert steady.saw(ASKED, said(GOOD, ("b", 4, Answer.ANSWERED), ("b", 6, Answer.LOST))) == ()
    assert steady.suspects() == set()


def test_an_answer_in_between_begins_the_count_again() -> None:
    steady = TargetHealth()
    for _ in range(3):
        steady.saw(ASKED, SILENT)
        steady.saw(ASKED, SILENT)
        assert steady.saw(ASKED, said(GOOD, ("b", 4, Answer.ANSWERED))) == ()


def test_what_this_host_refused_says_nothing_of_the_target() -> None:
    steady = TargetHealth()
    for _ in range(5):
        assert steady.saw(ASKED, said(GOOD, ("b", 4, Answer.UNREACHABLE))) == ()


def test_one_that_is_known_as_flaky_is_waited_for_now_and_then() -> None:
    steady = TargetHealth()
    for _ in range(FLAKY_AFTER_ROUNDS):
        steady.saw(ASKED, SILENT)
    waited = [bool(steady.suspects()) for _ in range(2 * RECHECK_EVERY_ROUNDS)]
    assert waited.count(True) == 2


async def test_a_round_waits_for_its_suspects() -> None:
    async with udp(lambda _: b"203.0.113.1") as (fast, _), udp(lambda _: None) as (slow, _):
        plan = CanaryPlan(targets=(Loopback("a", fast), Loopback("b", slow)), reserve=(), suspects={("b", 4)})
        async with asyncio.timeout(3):
            seen = await canaries(plan, Paths(None, Survey()))
    assert {(c.target, c.answer) for c in seen} == {("a", Answer.ANSWERED), ("b", Answer.LOST)}
