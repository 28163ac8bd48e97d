from ipaddress import ip_address

from tests.agent.leakwatch.bytes import ip, query, udp
from vpn_sentinel.agent.leakwatch.neighbors import KEEP_ASKING_LEAKING_S, KEEP_ASKING_S, MAX_NEIGHBORS, Neighbors
from vpn_sentinel.agent.net.packets import Packet, decode

ROUTER = ip_address("192.168.1.1")


class Known:
    """Neighbours, and the clock they go by."""

    def __init__(self) -> None:
        self.now = 100.0
        self.neighbors = Neighbors(lambda: self.now)

    def asks(self, to: str = "192.168.1.1") -> bool:
        """A program asks one; whether it is new."""
        return self.neighbors.saw(question(to), "eth0") is not None

    def said(self) -> list[str]:
        self.neighbors.forget()
        return [str(n.address) for n in self.neighbors.known]


def question(to: str) -> Packet:
    packet = decode(*ip("192.168.1.20", to, 17, udp(4000, 53, query("example.org"))))
    assert packet is not None
    return packet


def test_one_that_is_fine_is_asked_for_half_a_minute_and_its_packets_tell_nothing() -> None:
    known = Known()
    assert known.asks()
    known.neighbors.judged([ROUTER], [])
    assert [n.address for n in known.neighbors.quiet] == [ROUTER]
    known.now += KEEP_ASKING_S - 0.1
    assert known.said() == ["192.168.1.1"]
    assert known.neighbors.forget() is None  # nobody waits for its end
    known.now += 0.2
    assert known.said() == []


def test_one_that_leaks_is_over_ten_seconds_after_its_last_packet() -> None:
    known = Known()
    known.asks()
    known.now += KEEP_ASKING_S - 1.0  # hushed until a round found it out
    known.neighbors.judged([ROUTER], [ROUTER])
    assert known.neighbors.quiet == ()
    known.now += 6.0
    assert not known.asks()
    known.neighbors.judged([ROUTER], [ROUTER])  # a round is no packet
    assert known.neighbors.forget() == KEEP_ASKING_LEAKING_S
    known.now += KEEP_ASKING_LEAKING_S - 0.1
    assert known.said() == ["192.168.1.1"]
    known.now += 0.2
    assert known.said() == []


def test_one_that_leaked_and_is_asked_again_is_known_as_such_until_a_round_finds_it_well() -> None:
    known = Known()
    known.asks()
    known.neighbors.judged([ROUTER], [ROUTER])
    known.now += KEEP_ASKING_LEAKING_S + 1.0
    assert known.said() == []
    known.neighbors.judged([ip_address("127.0.0.53")], [ip_address("127.0.0.53")])
    assert known.asks()
    assert [n.address for n in known.neighbors.leaking] == [ROUTER]
    known.neighbors.judged([ROUTER], [])
    assert known.neighbors.leaking == ()


def test_what_is_remembered_is_bounded() -> None:
    known = Known()
    for number in range(50):
        known.asks(f"192.168.1.{number + 1}")
        known.neighbors.judged([], [ip_address(f"192.168.1.{number + 1}")])
    assert len(known.said()) == MAX_NEIGHBORS
    assert len(known.neighbors._leaking) <= MAX_NEIGHBORS + 1
