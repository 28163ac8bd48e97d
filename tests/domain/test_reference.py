"""What a reference agent's observation means: home internet, and nothing of a tunnel."""

from ipaddress import ip_address, ip_network

import pytest

from vpn_sentinel.domain.judge import home_of, judge_reference
from vpn_sentinel.domain.observation import Answer, Canary, Observation, Path, Probe, Trigger
from vpn_sentinel.domain.verdict import Code, State


def saw(
    *answers: tuple[Answer, str | None],
    path: Path = Path.OUTSIDE,
    portal: bool | None = None,
    flaky: tuple[str, ...] = (),
) -> Observation:
    canaries = tuple(
        Canary(
            probe=Probe.DEFAULT, target="cloudflare", family=6 if address and ":" in address else 4, answer=answer,
            path=path, address=ip_address(address) if address else None,
        )
        for answer, address in answers
    )  # fmt: skip
    return Observation(trigger=Trigger.TIMER, canaries=canaries, portal=portal, flaky=flaky)


WORKS = (Answer.ANSWERED, "91.10.20.30")
WORKS6 = (Answer.ANSWERED, "2003:e0:1:100::10")
LOST = (Answer.LOST, None)
CASES = {
    "home works": (saw(WORKS), State.PROTECTED, [], ["91.10.20.30/32"]),
    "both families": (saw(WORKS, WORKS6), State.PROTECTED, [], ["91.10.20.30/32", "2003:e0:1:100::/64"]),
    "one family is enough": (saw(LOST, WORKS6), State.PROTECTED, [], ["2003:e0:1:100::/64"]),
    "nothing answers": (saw(LOST, LOST), State.DOWN, [Code.UPLINK_DOWN], []),
    "a portal": (saw(LOST, portal=True), State.DOWN, [Code.CAPTIVE_PORTAL], []),
    "nothing was asked": (saw(), State.UNKNOWN, [Code.NOTHING_SEEN], []),
    "this host refuses": (saw((Answer.BLOCKED, None)), State.UNKNOWN, [Code.NOTHING_SEEN], []),
    "behind a tunnel itself": (saw(WORKS, path=Path.TUNNEL), State.UNKNOWN, [Code.NOTHING_SEEN], []),
    "behind carrier-grade NAT only": (saw((Answer.ANSWERED, "100.64.1.2")), State.PROTECTED, [], []),
    "one target is silent": (saw(WORKS, flaky=("opendns",)), State.PROTECTED, [Code.CANARY_FLAKY], ["91.10.20.30/32"]),
}


@pytest.mark.parametrize(("seen", "state", "codes", "homes"), CASES.values(), ids=CASES.keys())
def test_judge_reference(seen: Observation, state: State, codes: list[Code], homes: list[str]) -> None:
    verdict = judge_reference(seen)
    assert (verdict.state, [f.code for f in verdict.findings]) == (state, codes)
    assert list(home_of(seen)) == [ip_network(h) for h in homes]
