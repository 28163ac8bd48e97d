"""The kernel's table of sockets, asked about real ones."""

import os
import socket
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn_sentinel.agent.net.own import KEEP_S, OwnSockets
from vpn_sentinel.agent.net.sockets import ESTABLISHED, SocketTable, parse_socket

LO, FAR = ip_address("127.0.0.1"), ip_address("192.0.2.1")


@pytest.fixture
def sockets():
    found = SocketTable()
    yield found
    found.close()


def test_who_listens_and_who_sends_is_told(sockets: SocketTable) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            own = client.getsockname()[1]
            assert sockets.listens(port, 4)
            assert not sockets.listens(own, 4)
            found = sockets.of(6, LO, own, LO, port)
            assert found is not None
            assert (found.state, found.port, found.far_port) == (ESTABLISHED, own, port)
    assert sockets.of(6, LO, 1, LO, 2) is None


def test_a_packet_of_ipv4_may_be_an_ipv6_sockets(sockets: SocketTable) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as both:
        both.bind(("::", 0))
        port = both.getsockname()[1]
        found = sockets.of(17, LO, port, FAR, 53)
        assert found is not None
        assert found.far is None
    assert sockets.of(17, LO, port, FAR, 53) is None


def test_whose_a_packet_is_though_nat_gave_it_another_address(sockets: SocketTable) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            own = client.getsockname()[1]
            assert sockets.has(LO, own, LO, port)
            assert not sockets.has(FAR, own, LO, port)
            found = sockets.sender(6, own, LO, port)
            assert found is not None
            assert found.uid == os.getuid()
            assert sockets.sender(6, own, FAR, port) is None
            assert [(s.far, s.far_port) for s in sockets.connecting(own, 4)] == [(LO, port)]
            assert sockets.peer_users(LO, own) == {os.getuid()}
            assert sockets.peer_users(FAR, own) == frozenset()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as loose:
        loose.bind(("127.0.0.1", 0))
        found = sockets.sender(17, loose.getsockname()[1], FAR, 53)
        assert found is not None
        assert not found.is_kernels


@given(st.binary(max_size=120))
def test_bytes_never_raise(body: bytes) -> None:
    parse_socket(body)


def test_our_own_sockets_are_known_by_their_flow_until_shortly_after_their_end() -> None:
    now = [10.0]
    own = OwnSockets(lambda: now[0])
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", 9))
    port = sock.getsockname()[1]
    own.add(sock)
    assert own.has(17, port, LO, 9)
    assert not own.has(6, port, LO, 9)
    assert not own.has(17, port, FAR, 9)
    assert not own.has(17, port, LO, 10)
    sock.close()
    del sock
    assert own.has(17, port, LO, 9)
    now[0] += KEEP_S + 0.1
    assert not own.has(17, port, LO, 9)
