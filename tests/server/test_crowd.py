"""Who is connected: counted, made room for, and told to Prometheus."""

from prometheus_client import CollectorRegistry, generate_latest

from vpn_sentinel.server.crowd import Crowd, CrowdMetrics, Place


def entered(crowd: Crowd, host: str, gone: list[str] | None = None) -> Place:
    place = crowd.enter(host, 0.0, lambda: None if gone is None else gone.append(host))
    assert place is not None
    return place


def test_who_has_been_idle_for_longest_yields() -> None:
    crowd, gone = Crowd(4, 10, 10), list[str]()
    places = [entered(crowd, f"192.0.{n}.1", gone) for n in range(4)]
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


def test_where_all_are_busy_nobody_comes_in() -> None:
    crowd = Crowd(2, 10, 10)
    for n in range(2):
        entered(crowd, f"192.0.{n}.1").busy()
    assert crowd.enter("192.0.9.1", 0.0, list) is None


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
