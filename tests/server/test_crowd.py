"""Who is connected: counted, made room for, and told to Prometheus."""

import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vpn_sentinel.server.crowd import Crowd, CrowdMetrics, Place


def entered(crowd: Crowd, host: str, gone: list[str] | None = None, at: float = 0.0) -> Place:
    place = crowd.enter(host, at, lambda: None if gone is None else gone.append(host))
    assert place is not None
    return place


def test_who_has_been_idle_for_longest_yields() -> None:
    crowd, gone = Crowd(4, 10, 10), list[str]()
    places = [entered(crowd, f"192.0.{n}.1", gone) for n in range(4)]
    for place in places[1:]:
        place.idle()
    places[0].busy()
    places[1].idle()  # anew
    for n in range(4, 6):
        entered(crowd, f"192.0.{n}.1", gone)
    assert gone == ["192.0.2.1", "192.0.3.1"]
    assert len(crowd) == 4
    places[2].leave()  # its end is told once more, and counts once
    assert len(crowd) == 4
    places[0].idle()
    places[0].leave()
    assert len(crowd) == 3


def test_where_none_is_idle_who_has_been_served_for_longest_yields() -> None:
    crowd, gone = Crowd(3, 10, 10), list[str]()
    places = [entered(crowd, f"192.0.{n}.1", gone) for n in range(3)]
    for place in places:
        place.busy()
    places[0].busy()  # one request behind the other makes none of them newer
    entered(crowd, "192.0.3.1", gone).idle()
    entered(crowd, "192.0.4.1", gone)  # before which the one before it was idle
    assert gone == ["192.0.0.1", "192.0.3.1"]
    assert crowd.refused["all"] == 0


def test_who_just_came_is_heard_before_it_yields() -> None:
    crowd, gone = Crowd(4, 10, 10), list[str]()
    places = [entered(crowd, f"192.0.{n}.1", gone) for n in range(3)]
    for place in places:
        place.busy()
    for n in range(3, 6):  # in one turn of the loop
        entered(crowd, f"192.0.{n}.1", gone, at=5.0)
    assert gone == ["192.0.0.1", "192.0.1.1"]


def test_who_asks_nothing_goes_before_who_did() -> None:
    crowd, gone = Crowd(3, 10, 10), list[str]()
    entered(crowd, "192.0.0.1", gone, at=1.0).idle()
    entered(crowd, "192.0.1.1", gone, at=2.0)
    entered(crowd, "192.0.2.1", gone, at=3.5)
    entered(crowd, "192.0.3.1", gone, at=4.0)
    entered(crowd, "192.0.4.1", gone, at=4.2)
    assert gone == ["192.0.1.1", "192.0.0.1"]


def test_who_come_at_once_where_all_others_are_kept_have_their_place_in_turn() -> None:
    crowd, gone = Crowd(2, 10, 10), list[str]()
    entered(crowd, "192.0.0.1", gone).keep()
    for n in range(1, 4):
        entered(crowd, f"192.0.{n}.1", gone)
    assert gone == ["192.0.1.1", "192.0.2.1"]


def test_where_all_are_kept_nobody_comes_in() -> None:
    crowd = Crowd(2, 10, 10)
    for n in range(2):
        entered(crowd, f"192.0.{n}.1").keep()
    assert crowd.enter("192.0.9.1", 0.0, list) is None
    assert crowd.refused["all"] == 1


def test_one_network_does_not_take_all() -> None:
    crowd = Crowd(100, 2, 3)
    for host in ("192.0.2.1", "192.0.2.2", "::ffff:192.0.2.3", "2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:2::1"):
        entered(crowd, host)
    assert crowd.enter("192.0.2.4", 0.0, list) is None
    assert crowd.enter("2001:db8:0:3::1", 0.0, list) is None
    entered(crowd, "192.0.3.1")
    entered(crowd, "2001:db8:1::1")


def test_prometheus_hears_of_it() -> None:
    registry, crowd = CollectorRegistry(), Crowd(10, 1, 10)
    CrowdMetrics(registry, {"api": crowd})
    entered(crowd, "192.0.2.1")
    assert crowd.enter("192.0.2.1", 0.0, list) is None
    text = generate_latest(registry).decode()
    assert 'vpn_sentinel_connections{listener="api"} 1.0' in text
    assert 'vpn_sentinel_connections_refused_total{listener="api",reason="address"} 1.0' in text


SHARES = """
import resource, sys
from prometheus_client import CollectorRegistry
from vpn_sentinel.server.canary.listener import CanaryMetrics, Listener
from vpn_sentinel.server.serving import embedded

limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit // 2, limit))
web = [embedded(None), embedded(None, side=True), embedded(None, side=True)]
dns = Listener(None, CanaryMetrics(CollectorRegistry()))
print(sum(door.crowd._connections for door in (*web, dns)))
"""


@pytest.mark.parametrize("limit", [1024, 4096])
def test_all_listeners_together_leave_what_is_kept_back(limit: int) -> None:
    """In a process of its own: a limit is lowered once and for all."""
    out = subprocess.run([sys.executable, "-c", SHARES, str(limit)], capture_output=True, text=True, check=True)
    assert limit - 128 - 64 < int(out.stdout) <= limit - 128
