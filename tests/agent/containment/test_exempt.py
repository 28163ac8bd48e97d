"""What containment must not cut, tried with packets in a network namespace of the test's own."""

import os
import socket
import subprocess
import sys
from contextlib import suppress
from ipaddress import ip_network

import pytest

from vpn_sentinel.agent.containment.exempt import Exemptions
from vpn_sentinel.agent.containment.nft import Library
from vpn_sentinel.agent.containment.rules import AllowedTraffic, render
from vpn_sentinel.agent.leakwatch.meant import parse_meant
from vpn_sentinel.agent.net.routing_rules import Rule
from vpn_sentinel.agent.net.sockets import listening_ports

OUTSIDE = "203.0.113.5"


@pytest.fixture
def beside(namespace: None) -> None:
    """A way out beside the tunnel: what is sent there is counted by the device."""
    for words in (
        "link set lo up", "link add eth0 type veth peer name far0", "link set eth0 addrgenmode none",
        "link set far0 addrgenmode none", "link set far0 up",
        "link set eth0 up", "addr add 198.51.100.2/24 dev eth0",
        "route add default via 198.51.100.1", "neigh add 198.51.100.1 lladdr 02:00:00:00:00:01 dev eth0",
    ):  # fmt: skip
        subprocess.run(["ip", *words.split()], check=True)


def passes(port: int, *, source: int = 0, kind: socket.SocketKind = socket.SOCK_DGRAM) -> bool:
    before = count()
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", source))
        sock.setblocking(False)
        with suppress(OSError):  # EPERM is how a dropped datagram ends
            sock.connect((OUTSIDE, port))
            sock.send(b"x")
    return count() > before


def count() -> int:
    text = subprocess.run(["ip", "-s", "link", "show", "eth0"], check=True, capture_output=True, text=True).stdout
    lines = text.splitlines()
    return int(lines[next(n for n, line in enumerate(lines) if "TX:" in line) + 1].split()[1])


def contain(exempt: Exemptions) -> None:
    Library().run(render(AllowedTraffic(tunnel="wg0", exempt=exempt), "anna/0123"))


def test_what_is_declared_passes_and_nothing_else(beside: None) -> None:
    contain(Exemptions(meant=parse_meant("port 123/udp; published 8000/tcp; published 6881-6889/udp; user 12345")))
    assert passes(123)
    assert not passes(124)
    assert passes(9, source=6885)  # an answer of a published port
    assert not passes(9, source=6900)
    # What opens a connection is no answer, whichever port it is begun from.
    assert not passes(9, source=8000, kind=socket.SOCK_STREAM)


def test_a_users_and_an_interfaces(beside: None) -> None:
    contain(Exemptions(meant=parse_meant("user 0")))
    assert passes(9)
    contain(Exemptions(meant=parse_meant("only user 12345")))
    assert passes(9)
    contain(Exemptions(meant=parse_meant("only user 0")))
    assert not passes(9)
    contain(Exemptions(meant=parse_meant("interface eth0")))
    assert passes(9)


RULES = {
    "a user": Rule(version=4, priority=1, table=254, uids=(0, 10)),
    "a port of its own": Rule(version=4, priority=1, table=254, protocol=17, source_ports=(41641, 41641)),
    "a source": Rule(version=4, priority=1, table=254, source=ip_network("198.51.100.2/32")),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_vpn_programs_own_by_routing_rules(beside: None, rule: Rule) -> None:
    contain(Exemptions())
    assert not passes(9, source=41641)
    contain(Exemptions(excepted=(rule,)))
    assert passes(9, source=41641)


def test_a_visitor_gets_an_answer(beside: None) -> None:
    """A connection that is begun from outside works; one begun here does not leave, even from that port."""
    name = f"vs-visitor-{os.getpid()}"
    run = ["ip", "netns", "exec", name]
    visit = "import socket; s = socket.create_connection(('198.51.100.2', 8000), 3); print(s.recv(9).decode())"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "link", "set", "far0", "netns", name], check=True)
        for words in ("addr add 198.51.100.1/24 dev far0", "link set far0 up"):
            subprocess.run([*run, "ip", *words.split()], check=True)
        subprocess.run(["ip", "neigh", "del", "198.51.100.1", "dev", "eth0"], check=True)
        with socket.create_server(("0.0.0.0", 8000)) as server:
            server.settimeout(5)
            assert listening_ports() == {8000}
            contain(Exemptions(listening=listening_ports()))
            visitor = subprocess.Popen([*run, sys.executable, "-c", visit], stdout=subprocess.PIPE, text=True)
            connection, _ = server.accept()
            with connection:
                connection.send(b"welcome")
                assert visitor.communicate(timeout=10)[0] == "welcome\n"
        # The rule stands, and its port is nobody's now.
        assert not passes(9, source=8000, kind=socket.SOCK_STREAM)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
