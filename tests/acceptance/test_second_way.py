"""Down within seconds where the report has another way: a server on the LAN, which the kill switch lets through."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lab import Lab, Site
from tests.acceptance.stand import Stand, once

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module", params=["wireguard", "openvpn"])
def stand(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with ExitStack() as ends:
        site = Site("lan", vpn=request.param, provider="ch", kill_switch=True, kill_switch_lan=True, lan_server=True)
        lab = ends.enter_context(Lab([site]))
        made = Stand(lab, "lan", 0, tmp_path_factory.mktemp("lan"), lan=True)
        ends.callback(made.stop)
        made.start()
        made.wait_message("protected", 0, 10)
        yield made


@pytest.mark.parametrize("fault", ["link_down", "delete_tunnel", "block_endpoint", "no_forwarding", "half_open"])
def test_down_is_told_within_15_seconds(stand: Stand, fault: str) -> None:
    took, message = once(stand, getattr(stand.site, fault), "down", 18)
    assert took < 15
    assert "leak" not in message["plain"].lower()
    assert stand.status()["state"] == "down"


def test_a_report_over_the_lan_is_no_exit(stand: Stand) -> None:
    stand.settle()
    assert stand.status()["ip"] == stand.site.exit4
