import pytest

from tests.agent.leakwatch.bytes import ip, query, tcp, udp
from vpn_sentinel.agent.leakwatch.flow_table import (
    MAX_FLOWS,
    MAX_NAMES_PER_SERVER,
    REPORTED_FOR_S,
    REPORTED_WHEN_ROUTED_AGAIN_S,
    Direction,
    FlowTable,
)
from vpn_sentinel.agent.net.packets import Packet, decode

ME = "192.168.1.20"


def seen(to: str, port: int = 443, source_port: int = 4000, name: str | None = None) -> Packet:
    rest = udp(source_port, port, query(name)) if name else tcp(source_port, port, 0x18, b"x" * 60)
    packet = decode(*ip(ME, to, 17 if name else 6, rest))
    assert packet is not None
    return packet


def test_a_destination_is_news_once_and_its_packets_add_up() -> None:
    book = FlowTable()
    first = book.count(seen("203.0.113.5"), "eth0", 10.0)
    assert first is not None
    assert (first.interface, str(first.destination), first.destination_port) == ("eth0", "203.0.113.5", 443)
    assert book.count(seen("203.0.113.5", source_port=4001), "eth0", 11.0) is None
    (told,) = book.entries(12.0)
    assert (told.packets, told.size, told.source_port) == (2, 200, 4000)
    assert (told.first_age, told.last_age) == (2.0, 1.0)
    assert book.count(seen("203.0.113.5", port=80), "eth0", 12.0) is not None


def test_names_are_kept_apart_and_bounded() -> None:
    book = FlowTable()
    news = [book.count(seen("1.1.1.1", 53, 5000 + i, f"n{i}.example"), "eth0", float(i)) for i in range(50)]
    assert [n is not None for n in news] == [True] + [False] * 49
    told = book.entries(50.0)
    assert len(told) == MAX_NAMES_PER_SERVER
    assert sum(e.packets for e in told) == 50
    assert {e.name for e in told} == {f"n{i}.example" for i in range(MAX_NAMES_PER_SERVER)}


def test_the_book_is_bounded_and_forgets_the_oldest() -> None:
    book = FlowTable()
    for i in range(5000):
        book.count(seen(f"203.0.{i // 250}.{i % 250}"), "eth0", float(i))
    told = book.entries(5000.0)
    assert len(told) == MAX_FLOWS
    assert str(told[0].destination) == "203.0.19.249"


def test_what_is_over_is_forgotten_unless_it_would_leave_again() -> None:
    book = FlowTable()
    book.count(seen("203.0.113.5"), "eth0", 0.0)
    book.count(seen("203.0.113.6"), "eth0", 0.0)
    book.forget(REPORTED_FOR_S, lambda _: Direction.TUNNEL)
    assert len(book.entries(REPORTED_FOR_S)) == 2
    book.forget(
        REPORTED_FOR_S + 0.1, lambda e: Direction.OUTSIDE if str(e.destination) == "203.0.113.6" else Direction.TUNNEL
    )
    assert [str(e.destination) for e in book.entries(REPORTED_FOR_S + 0.1)] == ["203.0.113.6"]
    assert book.count(seen("203.0.113.5"), "eth0", 20.0) is not None  # leaks anew


def test_what_routes_led_outside_is_over_soon_when_they_lead_through_the_tunnel_again() -> None:
    book = FlowTable()
    book.count(seen("203.0.113.5"), "eth0", 0.0, routed=True)
    book.count(seen("203.0.113.6"), "eth0", 0.0, routed=False)  # by a socket that is bound to the device
    assert book.forget(0.5, lambda _: Direction.OUTSIDE) is None
    assert book.forget(0.5, lambda _: Direction.TUNNEL) == REPORTED_WHEN_ROUTED_AGAIN_S - 0.5
    assert len(book.entries(REPORTED_WHEN_ROUTED_AGAIN_S)) == 2
    assert (
        book.forget(REPORTED_WHEN_ROUTED_AGAIN_S + 1.0, lambda _: Direction.TUNNEL)
        == REPORTED_FOR_S - REPORTED_WHEN_ROUTED_AGAIN_S - 1.0
    )
    assert [str(e.destination) for e in book.entries(3.0)] == ["203.0.113.6"]


@pytest.mark.parametrize(("way", "kept"), [(Direction.OUTSIDE, 1), (Direction.UNKNOWN, 1), (Direction.TUNNEL, 0)])
def test_what_may_leave_by_its_route_is_held_on_to(way: Direction, kept: int) -> None:
    book = FlowTable()
    book.count(seen("203.0.113.5"), "eth0", 0.0, routed=True)
    book.forget(5.0, lambda _: way)
    assert len(book.entries(5.0)) == kept


def test_a_program_that_sends_every_five_seconds_against_the_routes_leaks_all_the_time() -> None:
    book = FlowTable()
    for second in range(60):
        if second % 5 == 0:
            book.count(seen("203.0.113.5"), "eth0", float(second), routed=second == 0)
        way = Direction.TUNNEL if second > 5 else Direction.OUTSIDE  # the route is mended at 6 s
        book.forget(float(second), lambda _, way=way: way)
        assert len(book.entries(float(second))) == 1


def test_packets_that_nobody_read_are_counted() -> None:
    book = FlowTable()
    book.missed(5, 0.0)
    assert book.entries(0.0) == ()
    book.count(seen("203.0.113.5"), "eth0", 0.0)
    book.missed(99, 1.0)
    (told,) = book.entries(1.0)
    assert (told.packets, told.size) == (100, 10_000)
