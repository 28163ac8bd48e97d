"""Who is connected: counted, made room for, and told to Prometheus."""

import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.conftest import needs_files
from vpn_sentinel.server.connection_limit import ConnectionLimit, ConnectionMetrics, ConnectionSlot


def entered(limit: ConnectionLimit, host: str, gone: list[str] | None = None, at: float = 0.0) -> ConnectionSlot:
    slot = limit.enter(host, at, lambda: None if gone is None else gone.append(host))
    assert slot is not None
    return slot


def test_who_has_been_idle_for_longest_yields() -> None:
    limit, gone = ConnectionLimit(4, 10, 10), list[str]()
    slots = [entered(limit, f"192.0.{n}.1", gone) for n in range(4)]
    for slot in slots[1:]:
        slot.idle()
    slots[0].busy()
    slots[1].idle()  # anew
    for n in range(4, 6):
        entered(limit, f"192.0.{n}.1", gone)
    assert gone == ["192.0.2.1", "192.0.3.1"]
    assert len(limit) == 4
    slots[2].release()  # its end is told once more, and counts once
    assert len(limit) == 4
    slots[0].idle()
    slots[0].release()
    assert len(limit) == 3


def test_where_none_is_idle_who_has_been_served_for_longest_yields() -> None:
    limit, gone = ConnectionLimit(3, 10, 10), list[str]()
    slots = [entered(limit, f"192.0.{n}.1", gone) for n in range(3)]
    for slot in slots:
        slot.busy()
    slots[0].busy()  # one request behind the other makes none of them newer
    entered(limit, "192.0.3.1", gone).idle()
    entered(limit, "192.0.4.1", gone)  # before which the one before it was idle
    assert gone == ["192.0.0.1", "192.0.3.1"]
    assert limit.refused["all"] == 0


def test_who_just_came_is_heard_before_it_yields() -> None:
    limit, gone = ConnectionLimit(4, 10, 10), list[str]()
    slots = [entered(limit, f"192.0.{n}.1", gone) for n in range(3)]
    for slot in slots:
        slot.busy()
    for n in range(3, 6):  # in one turn of the loop
        entered(limit, f"192.0.{n}.1", gone, at=5.0)
    assert gone == ["192.0.0.1", "192.0.1.1"]


def test_who_asks_nothing_goes_before_who_did() -> None:
    limit, gone = ConnectionLimit(3, 10, 10), list[str]()
    entered(limit, "192.0.0.1", gone, at=1.0).idle()
    entered(limit, "192.0.1.1", gone, at=2.0)
    entered(limit, "192.0.2.1", gone, at=3.5)
    entered(limit, "192.0.3.1", gone, at=4.0)
    entered(limit, "192.0.4.1", gone, at=4.2)
    assert gone == ["192.0.1.1", "192.0.0.1"]


def test_who_come_at_once_where_all_others_are_kept_have_their_place_in_turn() -> None:
    limit, gone = ConnectionLimit(2, 10, 10), list[str]()
    entered(limit, "192.0.0.1", gone).keep()
    for n in range(1, 4):
        entered(limit, f"192.0.{n}.1", gone)
    assert gone == ["192.0.1.1", "192.0.2.1"]


def test_where_all_are_kept_nobody_comes_in() -> None:
    limit = ConnectionLimit(2, 10, 10)
    for n in range(2):
        entered(limit, f"192.0.{n}.1").keep()
    assert limit.enter("192.0.9.1", 0.0, lambda: None) is None
    assert limit.refused["all"] == 1


def test_one_network_does_not_take_all() -> None:
    limit = ConnectionLimit(100, 2, 3)
    for host in ("192.0.2.1", "192.0.2.2", "::ffff:192.0.2.3", "2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:2::1"):
        entered(limit, host)
    assert limit.enter("192.0.2.4", 0.0, lambda: None) is None
    assert limit.enter("2001:db8:0:3::1", 0.0, lambda: None) is None
    entered(limit, "192.0.3.1")
    entered(limit, "2001:db8:1::1")


def test_prometheus_hears_of_it() -> None:
    registry, limit = CollectorRegistry(), ConnectionLimit(10, 1, 10)
    ConnectionMetrics(registry, {"api": limit})
    entered(limit, "192.0.2.1")
    assert limit.enter("192.0.2.1", 0.0, lambda: None) is None
    text = generate_latest(registry).decode()
    assert 'vpn_sentinel_connections{listener="api"} 1.0' in text
    assert 'vpn_sentinel_connections_refused_total{listener="api",reason="address"} 1.0' in text


SHARES = """
import resource, sys
from prometheus_client import CollectorRegistry
from vpn_sentinel.server.dns_canary.listener import DnsCanaryMetrics, DnsListener
from vpn_sentinel.server.serving import embedded

limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit // 2, limit))
web = [embedded(None), embedded(None, side=True), embedded(None, side=True)]
dns = DnsListener(None, DnsCanaryMetrics(CollectorRegistry()))
print(sum(door.connection_limit._connections for door in (*web, dns)))
"""


@pytest.mark.parametrize("limit", [pytest.param(n, marks=needs_files(n)) for n in (1024, 4096)])
def test_all_listeners_together_leave_what_is_kept_back(limit: int) -> None:
    """In a process of its own: a limit is lowered once and for all."""
    out = subprocess.run([sys.executable, "-c", SHARES, str(limit)], capture_output=True, text=True, check=True)
    assert limit - 128 - 64 < int(out.stdout) <= limit - 128
