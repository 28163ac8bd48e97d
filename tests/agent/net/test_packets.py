import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.leakwatch.bytes import ip, query, tcp, udp
from vpn_sentinel.agent.leakwatch.fingerprints import (
    MIN_ALIKE_PACKETS,
    Fingerprint,
    Fingerprints,
    is_dtls,
    is_openvpn_reset,
    is_openvpn_tcp_reset,
    is_wireguard,
)
from vpn_sentinel.agent.leakwatch.rules import is_dhcp
from vpn_sentinel.agent.net.endpoints import parse_endpoint
from vpn_sentinel.agent.net.packets import asked_name, decode

ME, FAR = "192.168.1.20", "203.0.113.5"


def decoded(protocol: int, rest: bytes, to: str = FAR):
    packet = decode(*ip(ME if "." in to else "2001:db8::2", to, protocol, rest))
    assert packet is not None
    return packet


def test_the_name_asked_is_read() -> None:
    packet = decoded(17, udp(4000, 53, query("tracker.example")))
    assert (packet.protocol_name, packet.source_port, packet.destination_port) == ("udp", 4000, 53)
    assert packet.name == "tracker.example"
    assert packet.size == 28 + len(query("tracker.example"))
    asked = query("a.example")
    assert decoded(6, tcp(4000, 53, 0x18, struct.pack("!H", len(asked)) + asked)).name == "a.example"
    assert decoded(17, udp(4000, 53, query("six.example")), "2001:db8::53").name == "six.example"


def test_a_pings_identifier_is_read() -> None:
    assert decoded(1, b"\x08\0\0\0\x12\x34\0\x01").echo == 0x1234
    assert decoded(58, b"\x80\0\0\0\x12\x34\0\x01", "2001:db8::53").echo == 0x1234
    assert decoded(1, b"\0\0\0\0\x12\x34\0\x01").echo is None  # an answer
    assert decoded(1, b"\x08\0\0").echo is None


def test_a_name_cannot_bring_control_characters() -> None:
    asked = struct.pack("!6H", 1, 0x0100, 1, 0, 0, 0) + b"\x03a\x1b.\x00\x00\x01\x00\x01"
    assert asked_name(asked) == "a??"
    assert asked_name(struct.pack("!6H", 1, 0x0100, 1, 0, 0, 0) + b"\0\0\1\0\1") == "."
    assert asked_name(query("x.example")[:14]) is None
    assert asked_name(b"\0\0\x81\x80" + query("x.example")[4:]) is None  # an answer


@given(st.binary(max_size=200), st.sampled_from([0x0800, 0x86DD, 0x0806]))
def test_bytes_never_raise(data: bytes, ethertype: int) -> None:
    packet = decode(ethertype, data)
    if packet is not None:
        assert packet.name is None or packet.name.isprintable()
        Fingerprints().of(packet, openvpn=True, unsure=True)


@given(st.sampled_from([0x45, 0x4F, 0x60]), st.sampled_from([1, 6, 17, 44, 58]), st.binary(max_size=120))
def test_bytes_behind_a_true_header_never_raise(first: int, protocol: int, rest: bytes) -> None:
    data = bytearray(rest)
    data[:1] = bytes([first])
    if len(data) > 9:
        data[6 if first == 0x60 else 9] = protocol
    decode(0x86DD if first == 0x60 else 0x0800, bytes(data))


WIREGUARD = {
    "a handshake begun": (b"\1\0\0\0" + b"k" * 144, True),
    "a handshake answered": (b"\2\0\0\0" + b"k" * 88, True),
    "an empty keepalive": (b"\4\0\0\0" + b"i" * 4 + (7).to_bytes(8, "little") + b"t" * 16, True),
    "data": (b"\4\0\0\0" + b"i" * 4 + (7).to_bytes(8, "little") + b"t" * 1436, True),
    "a DNS query": (query("a.example"), False),
    "a handshake of another length": (b"\1\0\0\0" + b"k" * 100, False),
    "data with an absurd counter": (b"\4\0\0\0" + b"i" * 4 + b"\xff" * 8 + b"t" * 16, False),
    "nothing": (b"", False),
}


@pytest.mark.parametrize(("payload", "told"), WIREGUARD.values(), ids=WIREGUARD.keys())
def test_wireguard_is_known_by_its_shape(payload: bytes, told: bool) -> None:
    assert is_wireguard(decoded(17, udp(4000, 51820, payload))) is told


COUNTED = struct.pack("!II", 1, 1_800_000_000)  # packet and time
RESETS = {
    "plain": (b"\x38" + b"s" * 8 + b"\0" * 5, 1194, True),
    "with tls-auth": (b"\x38" + b"s" * 8 + b"h" * 20 + b"\0\0\0\1tttt" + b"\0" * 5, 1194, True),
    "with tls-crypt": (b"\x38" + b"s" * 8 + COUNTED + b"s" * 37, 1194, True),
    "with tls-crypt-v2 of 2.6": (b"\x50" + b"s" * 8 + b"\x0f" + COUNTED[1:] + b"s" * 336, 1194, True),
    "with tls-crypt-v2": (b"\x50" + b"s" * 8 + COUNTED + b"s" * 334, 1194, True),
    "of its length, and no number of a packet": (b"\x38" + b"s" * 53, 1194, False),
    "of its length, and no time": (b"\x38" + b"s" * 8 + b"\0\0\0\1" + b"\xff" * 41, 1194, False),
    "a DNS query that begins so": (b"\x38" + b"s" * 53, 53, False),
    "another length": (b"\x38" + b"s" * 40, 1194, False),
    "QUIC": (b"\xc3" + b"q" * 1199, 443, False),
}


@pytest.mark.parametrize(("payload", "port", "told"), RESETS.values(), ids=RESETS.keys())
def test_an_openvpn_client_is_known_by_its_first_packet(payload: bytes, port: int, told: bool) -> None:
    assert is_openvpn_reset(decoded(17, udp(4000, port, payload))) is told


TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"r" * 506


@pytest.mark.parametrize(("payload", "port", "told"), RESETS.values(), ids=RESETS.keys())
def test_over_tcp_it_stands_behind_its_length(payload: bytes, port: int, told: bool) -> None:
    def known(data: bytes) -> bool:
        return is_openvpn_tcp_reset(decoded(6, tcp(4000, port, 0x18, data)))

    assert known(len(payload).to_bytes(2) + payload) is told
    assert not known((len(payload) + 1).to_bytes(2) + payload)
    assert not known(payload)
    assert not known(TLS_HELLO)
    assert not known(b"")


def test_openvpn_data_is_believed_when_it_goes_on_alike() -> None:
    shapes = Fingerprints()
    packet = decoded(17, udp(4000, 1194, b"\x48\0\0\1" + b"d" * 60))
    seen = [shapes.of(packet, openvpn=True, unsure=True) for _ in range(MIN_ALIKE_PACKETS)]
    assert seen == [Fingerprint.MAYBE] * (MIN_ALIKE_PACKETS - 1) + [Fingerprint.OWN]
    other = decoded(17, udp(4000, 1194, b"\x49\0\0\1" + b"d" * 60))
    assert shapes.of(other, openvpn=True, unsure=True) is Fingerprint.OTHER
    assert Fingerprints().of(packet, openvpn=True, unsure=False) is Fingerprint.OTHER
    assert Fingerprints().of(packet, openvpn=False, unsure=True) is Fingerprint.OTHER


def test_a_clients_hello_of_dtls_is_known() -> None:
    def known(head: bytes, protocol: int = 17) -> bool:
        rest = udp(4000, 8443, head + bytes(80)) if protocol == 17 else tcp(4000, 8443, 0x18, head + bytes(80))
        return is_dtls(decoded(protocol, rest))

    hello = b"\x16\xfe\xff\0\0" + bytes(6) + b"\0\x50" + b"\x01"
    assert known(hello)
    assert known(hello.replace(b"\xfe\xff", b"\xfe\xfd"))
    assert known(hello.replace(b"\xfe\xff", b"\x01\0"))  # Cisco's, before DTLS was done
    assert not known(hello, 6)
    for at, other in ((0, 23), (1, 3), (4, 1), (13, 2)):
        assert not known(hello[:at] + bytes([other]) + hello[at + 1 :])
    assert not is_dtls(decoded(17, udp(4000, 8443, hello[:13])))


def ike(length: int | None = None, exchange: int = 34, other: bytes = bytes(8)) -> bytes:
    body = b"k" * 200
    size = 28 + len(body) if length is None else length
    return b"i" * 8 + other + bytes([33, 0x20, exchange, 0x08]) + bytes(4) + struct.pack("!I", size) + body


def test_a_program_that_changes_its_protocol_is_known_by_its_first_packet_whatever_the_tunnel_was() -> None:
    def shape(payload: bytes, port: int, to: str = FAR, shapes: Fingerprints | None = None) -> Fingerprint:
        return (shapes or Fingerprints()).of(decoded(17, udp(4000, port, payload), to), openvpn=False, unsure=False)

    assert shape(b"\x38" + b"s" * 8 + COUNTED + b"s" * 37, 1194) is Fingerprint.OWN
    assert shape(b"\x38" + b"s" * 8 + b"\0" * 5, 443) is Fingerprint.OWN
    assert shape(ike(), 500) is Fingerprint.OWN
    for other in (ike(length=99), ike(exchange=35), ike(other=b"r" * 8)):
        assert shape(other, 500) is Fingerprint.OTHER
    assert shape(ike(), 501) is Fingerprint.OTHER
    shapes = Fingerprints()
    assert shape(b"\0\0\0\1" + b"esp" * 9, 4500, shapes=shapes) is Fingerprint.OTHER
    assert shape(ike(), 500, shapes=shapes) is Fingerprint.OWN
    assert shape(b"\0\0\0\1" + b"esp" * 9, 4500, shapes=shapes) is Fingerprint.OWN
    assert shape(b"\0\0\0\1" + b"esp" * 9, 4500, "203.0.113.6", shapes=shapes) is Fingerprint.OTHER


def test_endpoints_are_written_and_read() -> None:
    for text in ("198.51.100.7:51820/udp", "[2001:db8::7]:443/tcp"):
        assert str(parse_endpoint(text)) == text
    assert str(parse_endpoint("198.51.100.7:1194")) == "198.51.100.7:1194/udp"
    for text in ("198.51.100.7", "198.51.100.7:0", "2001:db8::7:443", "[198.51.100.7]:1", "x:1", "1.2.3.4:1/sctp"):
        with pytest.raises(ValueError, match=r"endpoint|address"):
            parse_endpoint(text)


# The option that names the client need not be the first.
ASKS6 = b"\5abc" + bytes.fromhex("0008000200000001000e000100012c9d1f0e020000000001")


@pytest.mark.parametrize(
    ("payload", "ports", "is_one"),
    [
        (ASKS6, (546, 547), True),
        (ASKS6, (4000, 547), False),
        (b"\7" + ASKS6[1:], (546, 547), False),  # a server's
        (ASKS6[:10], (546, 547), False),
        (b"\5hello there, this is no option", (546, 547), False),
        (b"", (546, 547), False),
    ],
)
def test_a_client_of_dhcpv6_is_known_by_its_message(payload: bytes, ports: tuple[int, int], is_one: bool) -> None:
    packet = decode(*ip("2001:db8::2", "2001:db8:1::1", 17, udp(*ports, payload)))
    assert packet is not None
    assert is_dhcp(packet) is is_one
