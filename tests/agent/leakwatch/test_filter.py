"""What the filter lets up, as sentences; and that the kernel's filter and the rules here say the same."""

import socket
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.leakwatch.bytes import HOST, OUTGOING, ip, query, run, tcp, udp
from vpn_sentinel.agent.leakwatch import bpf
from vpn_sentinel.agent.leakwatch.rules import PortRange, Rules
from vpn_sentinel.agent.net.endpoints import Endpoint, parse_endpoint
from vpn_sentinel.agent.net.packets import decode
from vpn_sentinel.agent.net.routing_rules import Rule

ME, ME6 = "192.168.1.20", "2001:db8:1::20"
RULES = Rules(
    endpoints=(parse_endpoint("198.51.100.7:51820"), parse_endpoint("[2001:db8:7::7]:1194/tcp")),
    marks=((51820, 0xFFFFFFFF),),
    outside=(ip_network("203.0.113.64/26"), ip_network("192.168.9.0/24")),
    lan=(ip_network("192.168.1.0/24"), ip_network("203.0.113.128/26"), ip_network("2001:db8:1::/64")),
    resolvers=(ip_network("9.9.9.9/32"), ip_network("2620:fe::/48")),
)
MADE = bpf.program(RULES)

LEAKS = {
    "UDP to the internet": ip(ME, "203.0.113.5", 17, udp(4000, 443, b"x")),
    "TCP's first packet": ip(ME, "203.0.113.5", 6, tcp(4000, 443, 0x02)),
    "TCP's data": ip(ME, "203.0.113.5", 6, tcp(4000, 443, 0x18, b"secret")),
    "a ping": ip(ME, "203.0.113.5", 1, b"\x08\0\0\0\0\1\0\1"),
    "a question for the time": ip(ME, "203.0.113.5", 1, b"\x0d\0\0\0\0\1\0\1" + bytes(12)),
    "a later fragment": ip(ME, "203.0.113.5", 17, b"x" * 64, offset=100),
    "another port of the VPN server": ip(ME, "198.51.100.7", 17, udp(4000, 443)),
    "another protocol of the VPN server": ip(ME, "198.51.100.7", 6, tcp(4000, 51820)),
    "a name asked of the internet": ip(ME, "1.1.1.1", 17, udp(4000, 53, query("a.example"))),
    "a name asked behind the home router": ip(ME, "10.0.0.53", 17, udp(4000, 53, query("a.example"))),
    "a name asked by TCP": ip(ME, "10.0.0.53", 6, tcp(4000, 53, 0x02)),
    "a name asked of the home router": ip(ME, "192.168.1.1", 17, udp(4000, 53, query("a.example"))),
    "a name asked of a forwarder on the own subnet": ip(ME, "172.17.0.1", 6, tcp(4000, 53, 0x02)),
    "a name asked of a host of a public LAN": ip(ME, "203.0.113.130", 17, udp(4000, 53, query("a.example"))),
    "a name asked of a router's link-local address": ip(ME6, "fe80::1", 17, udp(4000, 53, query("a.example"))),
    "a name asked of a cloud's resolver": ip(ME, "169.254.169.253", 17, udp(4000, 53, query("a.example"))),
    "DNS over TLS to the home router": ip(ME, "192.168.1.1", 6, tcp(4000, 853, 0x02)),
    "DNS over QUIC to it": ip(ME, "192.168.1.1", 17, udp(4000, 853, b"x")),
    "IPv6 to the internet": ip(ME6, "2001:db8:9::1", 17, udp(4000, 443)),
    "IPv6, TCP": ip(ME6, "2001:db8:9::1", 6, tcp(4000, 443, 0x02)),
    "IPv6, a ping": ip(ME6, "2001:db8:9::1", 58, b"\x80\0\0\0\0\1\0\1"),
    "a protocol without ports": ip(ME, "203.0.113.5", 47, b"\0\0\x08\0"),
}
FINE = {
    "the tunnel's own": ip(ME, "198.51.100.7", 17, udp(4000, 51820, b"\4\0\0\0")),
    "a fragment of the tunnel's own": ip(ME, "198.51.100.7", 17, b"x" * 64, offset=100),
    "the tunnel's own over IPv6": ip(ME6, "2001:db8:7::7", 6, tcp(4000, 1194)),
    "a fragment of it": ip(ME6, "2001:db8:7::7", 6, b"x" * 64, offset=100),
    "the LAN": ip(ME, "192.168.1.1", 17, udp(4000, 80)),
    "a public LAN": ip(ME, "203.0.113.130", 6, tcp(4000, 443)),
    "an answer to who asks the nameserver here": ip(ME, "192.168.1.30", 17, udp(53, 4000)),
    "a name asked of an allowed network": ip(ME, "192.168.9.1", 17, udp(4000, 53, query("a.example"))),
    "an allowed resolver by TLS": ip(ME, "9.9.9.9", 6, tcp(4000, 853, 0x02)),
    "a name asked of all on the link": ip(ME6, "ff02::1", 17, udp(4000, 53, query("a.example"))),
    "an allowed network": ip(ME, "203.0.113.70", 6, tcp(4000, 443)),
    "a private address beyond the LAN": ip(ME, "10.1.2.3", 6, tcp(4000, 443)),
    "an allowed resolver": ip(ME, "9.9.9.9", 17, udp(4000, 53, query("a.example"))),
    "an allowed resolver over IPv6": ip(ME6, "2620:fe::9", 6, tcp(4000, 53, 0x02)),
    "multicast": ip(ME, "239.255.255.250", 17, udp(4000, 1900)),
    "broadcast": ip(ME, "255.255.255.255", 17, udp(68, 67)),
    "a neighbour asked for": ip(ME6, "ff02::1:ff00:1", 58, b"\x87\0\0\0"),
    "a neighbour asked at its own address": ip(ME6, "2001:db8:9::1", 58, b"\x87\0\0\0"),
    "DHCPv6": ip(ME6, "fe80::1", 17, udp(546, 547)),
    "an ICMP error": ip(ME, "203.0.113.5", 1, b"\x03\x03\0\0\0\0\0\0"),
    "an answer to a ping": ip(ME, "203.0.113.5", 1, b"\0\0\0\0\0\1\0\1"),
    "an answer to a question for the time": ip(ME, "203.0.113.5", 1, b"\x0e\0\0\0\0\1\0\1" + bytes(12)),
    "a connection refused": ip(ME, "203.0.113.5", 6, tcp(4000, 443, 0x14)),
    "a connection taken": ip(ME, "203.0.113.5", 6, tcp(443, 4000, 0x12)),
}


@pytest.mark.parametrize(("ethertype", "data"), LEAKS.values(), ids=LEAKS.keys())
def test_a_leak_comes_up(ethertype: int, data: bytes) -> None:
    assert run(MADE, data, protocol=ethertype) == bpf.MAX_CAPTURE_BYTES
    packet = decode(ethertype, data)
    assert packet is not None
    assert not RULES.allow(packet)


@pytest.mark.parametrize(("ethertype", "data"), FINE.values(), ids=FINE.keys())
def test_what_a_kill_switch_lets_out_does_not(ethertype: int, data: bytes) -> None:
    assert run(MADE, data, protocol=ethertype) == bpf.DROP
    packet = decode(ethertype, data)
    assert packet is not None
    assert RULES.allow(packet)


def test_only_what_leaves_and_is_ip_and_carries_no_mark_of_the_tunnel() -> None:
    ethertype, data = LEAKS["UDP to the internet"]
    assert run(MADE, data, protocol=ethertype, kind=HOST) == bpf.DROP
    assert run(MADE, data, protocol=0x0806) == bpf.DROP
    assert run(MADE, data, protocol=ethertype, mark=51820) == bpf.DROP
    assert run(MADE, data, protocol=ethertype, mark=1) == bpf.MAX_CAPTURE_BYTES


ADDRESSES = ["203.0.113.5", "203.0.113.70", "198.51.100.7", "198.51.100.8", "192.168.1.9", "10.0.0.53", "9.9.9.9",
             "127.0.0.1", "203.0.113.130", "192.168.9.1", "169.254.1.1", "224.0.0.1", "255.255.255.255",
             "100.64.0.1"]  # fmt: skip
ADDRESSES6 = ["2001:db8:9::1", "2001:db8:7::7", "2001:db8:1::99", "fe80::1", "fd00::1", "ff02::1", "2620:fe::fe"]


@given(
    st.sampled_from(ADDRESSES + ADDRESSES6),
    st.sampled_from([1, 6, 17, 47, 58]),
    st.sampled_from([53, 67, 443, 547, 853, 1194, 51820]),
    st.integers(0, 255),
    st.sampled_from([0, 0, 5]),
)
def test_the_filter_and_the_rules_agree(to: str, protocol: int, port: int, byte: int, offset: int) -> None:
    rest = tcp(4000, port, byte) if protocol == 6 else udp(4000, port) if protocol == 17 else bytes([byte]) * 32
    ethertype, data = ip(ME if "." in to else ME6, to, protocol, rest, offset=offset)
    packet = decode(ethertype, data)
    assert packet is not None
    assert (run(MADE, data, protocol=ethertype) == bpf.DROP) == RULES.allow(packet)


@given(st.binary(max_size=120), st.sampled_from([0x0800, 0x86DD]))
def test_any_bytes_end_in_a_verdict(data: bytes, ethertype: int) -> None:
    assert run(MADE, data, protocol=ethertype) in (bpf.DROP, bpf.MAX_CAPTURE_BYTES)


def test_the_kernel_takes_it_with_many_networks() -> None:
    many = tuple(ip_network(f"203.0.{i}.0/24") for i in range(64)) + tuple(
        ip_network(f"2001:db8:{i:x}::/48") for i in range(64)
    )
    ends = tuple(Endpoint(ip_address(f"198.51.100.{i}"), 51820) for i in range(16))
    made = bpf.program(Rules(endpoints=ends, outside=many))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        bpf.attach(sock, made)
        bpf.attach(sock, MADE)
    ethertype, data = ip(ME, "203.1.0.1", 17, udp(1, 2))
    assert run(made, data, protocol=ethertype) == bpf.MAX_CAPTURE_BYTES


def test_networks_of_many_containers_make_no_filter_longer() -> None:
    """A socket has 20 KB for its filters before Linux 6.8: with some dozens of networks each tap was refused."""
    docker = Rules(lan=tuple(ip_network(f"172.{16 + i // 8}.{32 * (i % 8)}.0/19") for i in range(120)))
    assert len(bpf.program(docker)) <= len(bpf.program(Rules()))
    assert len(bpf.inbound(docker)) <= len(bpf.inbound(Rules()))
    assert len(bpf.exempt(docker, ())) <= len(bpf.exempt(Rules(), ()))
    ethertype, data = ip(ME, "172.30.4.4", 17, udp(1, 2))
    assert run(bpf.program(docker), data, protocol=ethertype) == bpf.DROP


def test_too_many_rules_are_refused_by_name() -> None:
    many = tuple(ip_network(f"203.{i}.{j}.0/24") for i in range(16) for j in range(0, 256, 2))
    with pytest.raises(ValueError, match="instructions"):
        bpf.program(Rules(outside=many))


WHOSE = Rules(
    excepted=(
        Rule(version=4, priority=1, protocol=50),
        Rule(version=4, priority=1, protocol=17, source_ports=(4000, 4009)),
        Rule(version=6, priority=1, source_ports=(4000, 4000), destination=ip_network("2001:db8:9::/48")),
    ),
    published=(PortRange(6, 8000, 8003), PortRange(17, 27015, 27015)),
    ports=(PortRange(17, 123, 123),),
)
WHOSE_MADE = bpf.program(WHOSE)


@given(
    st.sampled_from(ADDRESSES + ADDRESSES6),
    st.sampled_from([6, 17, 47, 50]),
    st.sampled_from([3999, 4000, 4009, 4010, 7999, 8000, 8003, 8004, 27015]),
    st.sampled_from([53, 122, 123, 443]),
    st.sampled_from([0x02, 0x10, 0x12, 0x18]),
    st.sampled_from([0, 0, 5]),
)
def test_the_filter_and_the_rules_agree_on_senders(
    to: str, protocol: int, own: int, port: int, flags: int, offset: int
) -> None:
    rest = tcp(own, port, flags) if protocol == 6 else udp(own, port) if protocol == 17 else bytes(32)
    ethertype, data = ip(ME if "." in to else ME6, to, protocol, rest, offset=offset)
    packet = decode(ethertype, data)
    assert packet is not None
    assert (run(WHOSE_MADE, data, protocol=ethertype) == bpf.DROP) == WHOSE.allow(packet)


def test_only_what_begins_outside_comes_in() -> None:
    made = bpf.inbound(RULES)

    def comes(source: str, protocol: int, rest: bytes, kind: int = HOST) -> bool:
        ethertype, data = ip(source, ME if "." in source else ME6, protocol, rest)
        return run(made, data, protocol=ethertype, kind=kind) != bpf.DROP

    assert comes("203.0.113.5", 6, tcp(5000, 8000, 0x02))
    assert comes("203.0.113.5", 17, udp(5000, 27015))
    assert comes("2001:db8:9::1", 6, tcp(5000, 8000, 0x02))
    assert not comes("203.0.113.5", 6, tcp(5000, 8000, 0x10))
    assert not comes("198.51.100.7", 17, udp(51820, 4000))  # the tunnel's own server
    assert comes("198.51.100.7", 17, udp(5000, 27015))  # a visitor who comes out at its host
    assert not comes("192.168.1.1", 17, udp(53, 4000))
    assert not comes("203.0.113.5", 17, udp(5000, 27015), OUTGOING)


def test_towards_some_hosts_packets_of_some_sizes_come_up() -> None:
    made = bpf.towards([ip_address("198.51.100.7"), ip_address("2001:db8:9::1")], range(100, 120))

    def comes(to: str, size: int, kind: int = OUTGOING) -> bool:
        ethertype, data = ip(ME if "." in to else ME6, to, 17, udp(1, 2))
        return run(made, data + bytes(size - len(data)), protocol=ethertype, kind=kind) != bpf.DROP

    for to in ("198.51.100.7", "2001:db8:9::1"):
        assert [size for size in (99, 100, 119, 120) if comes(to, size)] == [100, 119]
        assert not comes(to, 100, HOST)
    assert not comes("198.51.100.8", 100)


EXEMPT = replace(WHOSE, endpoints=RULES.endpoints, marks=RULES.marks, lan=RULES.lan)
TRUSTED = ((17, 4001), (6, 4444))


def test_what_is_excepted_comes_up_by_itself_but_not_the_tunnels_own() -> None:
    made = bpf.exempt(EXEMPT, TRUSTED)

    def comes(to: str, protocol: int, rest: bytes, mark: int = 0) -> bool:
        ethertype, data = ip(ME if "." in to else ME6, to, protocol, rest)
        return run(made, data, protocol=ethertype, mark=mark) == bpf.MAX_CAPTURE_BYTES

    assert comes("203.0.113.5", 6, tcp(5000, 80, 0x02), mark=51820)
    assert comes("203.0.113.5", 1, b"\x08\0\0\0\0\1\0\1", mark=51820)
    assert comes("2001:db8:9::1", 6, tcp(4000, 80, 0x02))  # by a rule's source port
    assert comes("203.0.113.5", 17, udp(4000, 80))
    assert comes("203.0.113.5", 17, udp(27015, 80))  # published
    assert comes("192.168.1.9", 6, tcp(5000, 443, 0x02))  # opened to the LAN
    assert comes("203.0.113.5", 6, tcp(4444, 80, 0x02), mark=51820)  # a new connection from a port that is trusted
    assert not comes("203.0.113.5", 6, tcp(5000, 80, 0x02))
    assert not comes("198.51.100.7", 17, udp(4000, 51820), mark=51820)
    assert not comes("203.0.113.5", 17, udp(4001, 80), mark=51820)
    assert not comes("203.0.113.5", 6, tcp(4444, 80, 0x10), mark=51820)
    assert not comes("192.168.1.9", 6, tcp(5000, 443, 0x10))
    assert not comes("192.168.1.9", 17, udp(4000, 443), mark=51820)
    assert not comes("203.0.113.5", 6, tcp(5000, 80, 0x12), mark=51820)  # an answer
    assert not comes("203.0.113.5", 50, b"\0" * 8)  # a protocol without ports
    assert bpf.exempt(replace(EXEMPT, inside=((1, 1),)), ()) == []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        bpf.attach(sock, made)
