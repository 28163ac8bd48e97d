"""How rows become words."""

import pytest

from vpn_sentinel.domain.verdict import State
from vpn_sentinel.server.dashboard import view

SPANS = {
    0: "0 s", 59: "59 s", 60: "1 min", 119: "1 min", 3600: "1 h", 3660: "1 h 1 min", 5400: "1 h 30 min",
    36_000: "10 h", 39_600: "11 h", 86400: "1 d", 90_000: "1 d 1 h", 864_000: "10 d", -5: "0 s",
}  # fmt: skip


@pytest.mark.parametrize(("seconds", "said"), SPANS.items())
def test_span(seconds: float, said: str) -> None:
    assert view.span(seconds) == said


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
