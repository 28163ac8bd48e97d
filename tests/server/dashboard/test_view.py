"""How rows become words."""

from dataclasses import dataclass

import pytest

from vpn_sentinel.domain.verdict import State
from vpn_sentinel.server.dashboard import view
from vpn_sentinel.wire import rest

SPANS = {
    0: "0 s", 59: "59 s", 60: "1 min", 119: "1 min", 3600: "1 h", 3660: "1 h 1 min", 5400: "1 h 30 min",
    36_000: "10 h", 39_600: "11 h", 86400: "1 d", 90_000: "1 d 1 h", 864_000: "10 d", -5: "0 s",
}  # fmt: skip


@pytest.mark.parametrize(("seconds", "said"), SPANS.items())
def test_span(seconds: float, said: str) -> None:
    assert view.short_duration(seconds) == said


HEADLINES = {
    "nothing": ({}, "No tunnels yet", "VPN Sentinel"),
    "one, well": ({State.PROTECTED: 1}, "The tunnel is protected", "VPN Sentinel"),
    "all well": ({State.PROTECTED: 3}, "All 3 tunnels are protected", "VPN Sentinel"),
    "one of three leaks": ({State.PROTECTED: 2, State.LEAKING: 1}, "1 tunnel is leaking", "1 leaking – VPN Sentinel"),
    "worst speaks": ({State.DOWN: 4, State.SILENT: 9}, "4 tunnels are down", "4 down – VPN Sentinel"),
    "new": ({State.PENDING: 2}, "All 2 tunnels have no verdict yet", "2 pending – VPN Sentinel"),
}


@pytest.mark.parametrize(("counts", "headline", "title"), HEADLINES.values(), ids=HEADLINES.keys())
def test_headline(counts: dict[State, int], headline: str, title: str) -> None:
    head = view.overview(counts)
    assert (head.headline, head.title) == (headline, title)


@dataclass(frozen=True)
class Change:
    """A transition's row, as far as the day's figures need it."""

    at: float
    new: str
    old: str = "protected"


def tunnel(state: str, since: float) -> rest.Tunnel:
    return rest.Tunnel(
        name="nl", state=State(state), since=rest.moment(since), findings=[], last_seen=None, deadline=None,
        exit=rest.Exit(), place=rest.PlaceBody(), resolvers=[], dns_loc=None, dns_colo=None, source="agent",
        client_version=None, interval=None, created_at=rest.moment(0.0),
    )  # fmt: skip


HOUR = 3600.0
DAYS = {
    "well all day": ([], "protected", "Protected 100 % of the time that was verified (1 d)."),
    "an hour that nobody verified counts on no side": (
        [Change(20 * HOUR, "unverified"), Change(21 * HOUR, "protected", "unverified")],
        "protected",
        "Protected 100 % of the time that was verified (23 h). Not verified for 1 h.",
    ),
    "silence is not verified either": (
        [Change(22 * HOUR, "silent")],
        "silent",
        "Protected 100 % of the time that was verified (22 h). Not verified for 2 h.",
    ),
    "trouble is": (
        [Change(18 * HOUR, "leaking"), Change(24 * HOUR - 1800, "protected", "leaking")],
        "protected",
        "Protected 77 % of the time that was verified (1 d).",
    ),
    "one second of a leak is not none": (
        [Change(18 * HOUR, "leaking"), Change(18 * HOUR + 1, "protected", "leaking")],
        "protected",
        "Protected 99.9 % of the time that was verified (1 d).",
    ),
    "never verified": ([Change(1.0, "unverified", "pending")], "unverified", "Not verified for 1 d."),
}


@pytest.mark.parametrize(("moved", "state", "said"), DAYS.values(), ids=DAYS.keys())
def test_what_was_not_verified_is_no_part_of_the_days_protection(moved: list[Change], state: str, said: str) -> None:
    known = tunnel(state, since=moved[-1].at if moved else 0.0)
    newest_first = sorted(moved, key=lambda c: -c.at)
    assert view.day_summary(known, newest_first, 24 * HOUR, complete=True) == said  # type: ignore[arg-type]
