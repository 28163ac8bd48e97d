"""What rules let out by a mark, a user or a port, though it is anybody's: real sockets, rules and firewalls.

The tunnel is that of `test_whose`: a rule sends everybody into it. For each hole, what a VPN's program or a service
does by the same means stays no leak.
"""

import pytest

from tests.agent.leakwatch.test_watch import ran
from tests.agent.leakwatch.test_whose import TUNNEL, VISITOR

RULES = """
def nft(chain):
    subprocess.run(["nft", "-f", "-"], input=f"table inet t {{ {chain}; }}".encode(), check=True)

def marking(rule):
    nft("chain marking { type route hook output priority mangle; " + rule + " meta mark set 7; }")
    nft("chain nat { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }")

def plain(uid=0, kind=socket.SOCK_DGRAM, protocol=0, port=0, mark=0, host="0.0.0.0"):
    import os; os.setegid(0); os.seteuid(uid) if not protocol else None
    made = socket.socket(socket.AF_INET, kind, protocol)
    os.seteuid(0)
    if mark:
        made.setsockopt(socket.SOL_SOCKET, 36, mark)
    if port:
        made.bind((host, port))
    made.setblocking(False)
    return made

def connects(to, port=80, **how):
    made = plain(kind=socket.SOCK_STREAM, **how)
    made.connect_ex((to, port))
    return made

sh("ip addr add 10.9.0.2/32 dev wg0", "ip route add default via 192.168.7.1 dev eth0 table 100")
sh("ip rule add pref 950 table 42")
MARK = "ip rule add pref 900 fwmark 7 lookup 100"

async def told(*to):
    await until(lambda: set(to) <= {str(e.destination) for e in acted})

async def settled():
    await until(lambda: not watch._exempt._trials._running and not watch._exempt._proxies._running)
"""


async def seen(script: str, **make: object) -> list[str]:
    """Where leaks went, by the first packet of each destination."""
    arguments = ", ".join(f"{k}={v!r}" for k, v in make.items())
    end = "await settled()\nsay(to=sorted({str(e.destination) for e in acted}))"
    script = script.replace("MAKE", f"watch = make({arguments})")
    found = (await ran(f"{TUNNEL}\n{RULES}\n{script}\n{end}", users=True))["to"]
    assert isinstance(found, list)
    return found


MARKED = {
    "connections to a port": ("tcp dport 80", "connects('203.0.113.1')"),
    "datagrams to a port": ("udp dport 4444", "plain().sendto(b'x', ('203.0.113.1', 4444))"),
    "a network": ("ip daddr 203.0.113.0/24", "plain().sendto(b'x', ('203.0.113.1', 999))"),
    "pings": (
        "ip protocol icmp",
        "plain(kind=socket.SOCK_RAW, protocol=1).sendto(bytes.fromhex('0800f7fe00000001'), ('203.0.113.1', 0))",
    ),
    "a type of service": (
        "ip dscp ef",
        "one = plain(); one.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xB8); one.sendto(b'x', ('203.0.113.1', 999))",
    ),
    "a person": ("meta skuid 1000", "connects('203.0.113.1', uid=1000)"),
    "a person, whose socket is gone": (
        "meta skuid 1000",
        "one = plain(uid=1000); one.sendto(b'x', ('203.0.113.1', 4444)); one.close()",
    ),
    "a person with other numbers": ("meta skuid 1234", "one = plain(uid=1234); one.sendto(b'x', ('203.0.113.1', 999))"),
}


@pytest.mark.parametrize(("rule", "script"), MARKED.values(), ids=MARKED.keys())
async def test_what_a_firewall_marks_for_everybody_is_told(rule: str, script: str) -> None:
    assert await seen(f"sh(MARK)\nmarking({rule!r})\nMAKE\nkept = {script}\nawait told('203.0.113.1')") == [
        "203.0.113.1"
    ]


async def test_the_mark_of_the_tunnels_own_rule_is_no_hole_either() -> None:
    assert await seen(
        "sh('ip rule del pref 950', 'ip rule add pref 900 not fwmark 7 table 42')\nmarking('tcp dport 80')\nMAKE\n"
        "kept = connects('203.0.113.1'); await told('203.0.113.1')",
    ) == ["203.0.113.1"]


async def test_over_ipv6_too() -> None:
    six = """
for line in ("addr add 2001:db8:7::2/64 dev eth0 nodad", "addr add fd00:9::2 dev wg0 nodad",
             "neigh add 2001:db8:7::1 lladdr 02:00:00:00:00:01 dev eth0", "route add default dev wg0 table 42",
             "route add default via 2001:db8:7::1 dev eth0 table 100", "rule add pref 950 table 42",
             "rule add pref 900 fwmark 7 lookup 100"):
    sh(f"ip -6 {line}")
marking("tcp dport 80")
MAKE
kept = socket.socket(socket.AF_INET6, socket.SOCK_STREAM); kept.setblocking(False)
kept.connect_ex(("2001:db8:99::1", 80))
await told("2001:db8:99::1")
"""
    assert await seen(six) == ["2001:db8:99::1"]


MEANT = {
    "a program of root's marks its packets itself": ("", "plain(mark=7).sendto(b'STUN', ('203.0.113.1', 3478))"),
    "and its connections": ("", "connects('203.0.113.1', 443, mark=7)"),
    "a person's program marks its packets itself": (
        "tcp dport 80",
        "plain(uid=1000, mark=7).sendto(b'STUN', ('203.0.113.1', 3478))",
    ),
    "a firewall marks what the VPN's own user sends": ("meta skuid 997", "connects('203.0.113.1', 443, uid=997)"),
    "a firewall marks what a port of its own sends": (
        "udp sport 51820",
        "plain(port=51820).sendto(b'x', ('203.0.113.1', 51820))",
    ),
}


@pytest.mark.parametrize(("rule", "script"), MEANT.values(), ids=MEANT.keys())
async def test_what_a_vpns_program_is_excepted_by_is_none(rule: str, script: str) -> None:
    """A program's own packets, and behind them, what everybody's are: that one is told."""
    assert await seen(
        f"sh(MARK)\nmarking({rule or 'tcp dport 4'!r})\nMAKE\nkept = {script}\n"
        "await until(lambda: watch._exempt._trials._running); await settled()",
    ) == []  # fmt: skip


async def test_a_vpns_socket_is_tried_once_and_stays_in_the_kernel_then() -> None:
    assert await seen(
        "sh(MARK)\nmarking('tcp dport 80')\nMAKE\nown = plain(mark=7, port=41641)\n"
        "own.sendto(b'STUN', ('203.0.113.1', 3478))\n"
        "await until(lambda: watch._exempt._trusted); await until(lambda: watch._exempt._filter_timer is None)\n"
        "tap, read = next(iter(watch._exempt._taps.values())), []\n"
        "real = tap._on_packet; tap._on_packet = lambda *told: (read.append(told), real(*told))\n"
        "for n in range(9): own.sendto(b'STUN', (f'203.0.113.{n + 10}', 3478))\n"
        "kept = connects('203.0.113.2'); await told('203.0.113.2')\n"  # behind them
        "assert len(read) <= 3, len(read)",  # it, again, and ours
    ) == ["203.0.113.2"]


async def test_a_visitors_answer_that_a_connection_mark_leads_out_is_none() -> None:
    assert await seen(
        f"{VISITOR}\nsh(MARK)\n"
        "nft('chain back { type route hook output priority mangle; udp sport 27015 meta mark set 7; }')\nMAKE\n"
        "server = plain(uid=1000, port=27015)\n"
        "visit(17, udp_bytes(5000, 27015, b'hello'))\n"
        "server.sendto(b'welcome', ('203.0.113.50', 5000)); await asyncio.sleep(0.3)",
    ) == []  # fmt: skip


SPORT = "sh('ip rule add pref 900 ipproto udp sport 6881 lookup 100')\n"


async def test_a_persons_program_that_has_a_port_which_a_rule_lets_out_is_told() -> None:
    assert await seen(
        f"{VISITOR}\nMAKE\n{SPORT}kernel.changed(); watch.update(around())\n"
        "torrent = plain(uid=1000, port=6881, host='192.168.7.2')\n"
        "visit(17, udp_bytes(5000, 6881, b'hello'))\n"
        "torrent.sendto(b'welcome', ('203.0.113.50', 5000))\n"  # an answer
        "torrent.sendto(b'hello', ('203.0.113.1', 6881)); await told('203.0.113.1')",
    ) == ["203.0.113.1"]


async def test_a_vpns_program_may_have_such_a_port() -> None:
    assert await seen(
        f"{SPORT}MAKE\nclock.now += 61\n"
        "kept = plain(port=6881, host='192.168.7.2'); kept.sendto(b'hello', ('203.0.113.1', 6881))\n"
        "await until(lambda: watch._exempt._trusted)",
    ) == []  # fmt: skip


# A program that opens its port as root and goes on as another user; it ends by itself.
PROXY = """
takes = subprocess.Popen([sys.executable, "-c",
    "import os, signal, socket; signal.alarm(30); s = socket.create_server(('0.0.0.0', 3128)); os.setuid(1500);"
    "print(flush=True); kept = [s.accept() for _ in range(9)]"], stdout=-1)
takes.stdout.readline()
import atexit; atexit.register(takes.kill)
sh("ip rule add pref 900 uidrange 1500-1500 lookup 100")
"""
LED = """
nft("chain led { type nat hook output priority -100; meta skuid != 1500 tcp dport { 80, 8080 } redirect to :3128; }")
"""


@pytest.mark.parametrize("whose", ["!= 1500", "1000"])
async def test_what_a_proxy_sends_on_that_takes_everybodys_connections_is_told(whose: str) -> None:
    led = LED.replace("!= 1500", whose)
    assert await seen(f"{PROXY}{led}MAKE\nkept = connects('203.0.113.1', uid=1500); await told('203.0.113.1')") == [
        "203.0.113.1"
    ]


async def test_a_user_that_is_meant_to_go_outside_is_none_though_it_takes_connections() -> None:
    assert await seen(
        f"{PROXY}MAKE\nkept = connects('203.0.113.1', uid=1500)\n"
        "await until(lambda: watch._exempt._proxies._running)",
    ) == []  # fmt: skip


async def test_what_the_proxy_sends_to_other_ports_than_it_takes_is_its_own() -> None:
    assert await seen(
        f"{PROXY}{LED}MAKE\nkept = connects('203.0.113.1', 443, uid=1500)\n"
        "await until(lambda: watch._exempt._proxies._running)",
    ) == []  # fmt: skip


async def test_what_a_published_port_begins_is_told_and_its_visitors_are_answered() -> None:
    assert await seen(
        f"{VISITOR}\nMAKE\n"
        "own = plain(port=6881); own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0')\n"
        "own.sendto(b'x', ('203.0.113.3', 5000))\n"  # as from before the watch
        "visit(17, udp_bytes(5000, 6881, b'hello'))\n"
        "await until(lambda: len(watch._flows._visitors) == 2); clock.now += 600\n"
        "own.sendto(b'x', ('203.0.113.3', 5000)); own.sendto(b'x', ('203.0.113.50', 5001))\n"
        "visit(17, udp_bytes(5000, 6881, b'roams'), '203.0.113.51'); own.sendto(b'x', ('203.0.113.51', 5000))\n"
        "own.sendto(b'\\1\\0\\0\\0' + bytes(144), ('203.0.113.52', 5000))\n"  # WireGuard's to a peer that was there
        "own.sendto(b'x', ('203.0.113.1', 5000)); await told('203.0.113.1')",
        meant="published 6881/udp",
    ) == ["203.0.113.1"]


async def test_the_end_of_a_connection_that_may_go_outside_may_too() -> None:
    """The kernel sends it when the socket is nobody's any more."""
    ends = """
sh("ip rule add pref 900 uidrange 1500-1500 lookup 100")
from tests.agent.leakwatch.bytes import ip, tcp as tcp_bytes
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
raw.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
def out(port, flags):
    raw.sendto(ip("192.168.7.2", "203.0.113.1", 6, tcp_bytes(port, 443, flags))[1], ("203.0.113.1", 0))
MAKE
own = connects("203.0.113.1", 443, uid=1500); port = own.getsockname()[1]
await until(lambda: "203.0.113.1" in came)
own.close()
out(port, 0x11); out(port + 1, 0x11)  # the latter of somebody else
await told("203.0.113.1")
assert [e.source_port - port for e in acted] == [1]
"""
    assert await seen(ends) == ["203.0.113.1"]


TO_LAN = """
sh("ip neigh add 192.168.7.9 lladdr 02:00:00:00:00:09 dev eth0", "ip rule add pref 100 to 192.168.7.0/24 lookup main")
nft("chain led { type nat hook output priority -100; RULE dnat ip to 192.168.7.9; }")
nft("chain nat { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }")
MAKE
"""


async def test_connections_that_a_firewall_leads_to_a_machine_of_the_lan_are_told() -> None:
    lan = TO_LAN.replace("RULE", "tcp dport 443")
    assert await seen(
        f"{lan}lan = connects('192.168.7.9', 443)\nkept = connects('203.0.113.1', 443); await told('203.0.113.1')"
    ) == ["203.0.113.1"]


async def test_what_is_meant_for_the_lan_or_led_there_from_one_address_of_the_owners_own_is_none() -> None:
    """The latter as the owner says by VPN_SENTINEL_ALLOWED_OUTSIDE."""
    lan = TO_LAN.replace("RULE", "ip daddr 203.0.113.70 tcp dport 443")
    assert await seen(
        f"{lan}one, two = connects('192.168.7.9', 443), connects('203.0.113.70', 443); await asyncio.sleep(0.4)",
        allowed=("203.0.113.64/26",),
    ) == []  # fmt: skip


async def test_connections_that_a_firewall_leads_to_a_container_here_are_none() -> None:
    """What that one sends on goes by the routes of this host."""
    bridge = TO_LAN.replace("RULE", "tcp dport 443").replace("192.168.7.9", "172.18.0.2").replace("dev eth0", "dev br0")
    bridge = bridge.replace("192.168.7.0/24", "172.18.0.0/16")
    assert await seen(
        "sh('ip link add br0 type veth peer name box', 'ip addr add 172.18.0.1/16 dev br0',"
        " 'ip link set box up', 'ip link set br0 up')\n"
        f"{bridge}kept = connects('203.0.113.1', 443)\n"
        "await asyncio.sleep(0.5)",
    ) == []  # fmt: skip


async def test_a_mark_of_somebody_elses_says_nothing_of_a_tunnel_that_routes_keep_its_packets_out_of() -> None:
    """OpenVPN's own packets go by the host route that it made, whatever rule is beside it, Tailscale's say."""
    routes = """
sh("ip rule del pref 950", MARK, "ip route add 0.0.0.0/1 dev wg0", "ip route add 128.0.0.0/1 dev wg0")
sh("ip route add 198.51.100.9 via 192.168.7.1 dev eth0")
MAKE
own = plain(); own.sendto(b"x" * 80, ("198.51.100.9", 1194))
udp().sendto(b"x", ("203.0.113.1", 443)); await told("203.0.113.1")
"""
    assert await seen(routes, endpoints=()) == ["203.0.113.1"]


async def test_where_a_mark_alone_tells_the_tunnels_packets_its_server_may_be_marked_by_its_address() -> None:
    alone = """
sh(MARK)
marking("ip daddr { 198.51.100.9, 203.0.113.1 }")
MAKE
own = plain(); own.sendto(b"x" * 80, ("198.51.100.9", 1194))
await until(lambda: watch._exempt._trials._known)
kept = connects("203.0.113.1", uid=1000); await told("203.0.113.1")
"""
    assert await seen(alone, endpoints=()) == ["203.0.113.1"]
