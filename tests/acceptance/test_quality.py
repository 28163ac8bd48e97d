"""How well a tunnel carries, and how soon a black hole is known: rows 30, 31, 32, and 6 to 9 on the server's clock.

The server has a leg on the LAN, by which reports go; its public address is where the pulses go, through the tunnel.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lab import Lab, Site, until
from tests.acceptance.stand import Stand

pytestmark = pytest.mark.acceptance

BLACK_HOLE = 5.0  # seconds from the fault to the server's verdict


@pytest.fixture(scope="module", params=["wireguard", "openvpn"])
def stand(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with ExitStack() as ends:
        site = Site("well", vpn=request.param, provider="ch", kill_switch=True, kill_switch_lan=True, lan_server=True)
        lab = ends.enter_context(Lab([site]))
        urls = f"http://{lab.site('well').server_lan}:5000,http://{lab.server4}:5000"
        made = Stand(lab, "well", 0, tmp_path_factory.mktemp("well"), agent={"VPN_SENTINEL_URL": urls})
        ends.callback(made.stop)
        made.start()
        made.wait_message("protected", 0, 10)
        yield made


def pulsing(stand: Stand) -> None:
    """Wait until pulses are answered, so that a fault meets a healthy agent."""
    since = time.time()
    until(lambda: newest(stand, since).get("pulses"), 20, "pulses that are answered", interval=0.2)


def newest(stand: Stand, since: float) -> dict[str, object]:
    seen = stand.observations(since, time.time() + 1)
    return dict(max(seen, key=lambda o: str(o["at"]), default={}).get("body", {}))


@pytest.mark.parametrize("fault", ["block_endpoint", "no_forwarding", "half_open"])
def test_rows_6_7_9_a_black_hole_is_known_within_5_seconds(stand: Stand, fault: str) -> None:
    took = []
    for _ in range(2):
        stand.settle()
        pulsing(stand)
        began = time.time()
        getattr(stand.site, fault)()
        stand.wait_state("down", 15)
        took.append(time.time() - began)
        moved = next(m for m in reversed(stand.history()) if m["new"] == "down")
        assert -0.1 < stand.seconds(moved["at"]) - began < 2.7  # dated at the first pulse that got no reply
    print(f"{fault}: {', '.join(f'{t:.2f} s' for t in took)}; median {statistics.median(took):.2f} s")
    assert max(took) < BLACK_HOLE + 0.3  # the state is asked for every 0.1 s


def test_row_32_a_third_lost_is_degraded_and_never_down(stand: Stand) -> None:
    stand.settle()
    pulsing(stand)
    began = time.time()
    stand.site.loss(30)
    stand.wait_state("degraded", 150)  # a burst of pulses that happens to lose few is repeated a minute later
    print(f"30 % loss: degraded after {time.time() - began:.1f} s")
    assert "high_loss" in stand.codes()
    assert "down" not in [m["new"] for m in stand.history() if stand.seconds(m["at"]) > began]


def test_row_31_a_full_line_is_degraded_at_most(stand: Stand) -> None:
    stand.settle()
    pulsing(stand)
    began = time.time()
    stand.site.saturate()
    end = began + 30
    while time.time() < end:
        assert stand.status()["state"] in ("protected", "degraded"), stand.status()
        time.sleep(0.5)
    print(f"full line: {stand.status()['state']}, {sorted(stand.codes())}, {newest(stand, began).get('quality')}")


def test_row_30_packets_that_vanish_by_their_size(stand: Stand) -> None:
    stand.settle()
    pulsing(stand)
    began = time.time()
    stand.site.mtu_black_hole()
    stand.wait_state("degraded", 150)
    print(f"MTU black hole: degraded after {time.time() - began:.1f} s, {newest(stand, began).get('quality')}")
    assert "mtu_blackhole" in stand.codes()
