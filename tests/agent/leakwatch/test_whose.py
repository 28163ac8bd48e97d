"""Whose packet it is, on real sockets: for each exemption, the packet of an ordinary program beside it is still told.

The tunnel is a tun device that a default route in a table of its own leads to; the cable is that of `test_watch`.
"""

from typing import Any

import pytest

from tests.agent.leakwatch.test_watch import ran

# A tunnel whose rule spares nothing; `rule` adds what the case is about.
TUNNEL = """
def sh(*lines):
    for line in lines:
        subprocess.run(line.split(), check=True)

def udp(mark=0, port=0, uid=None):
    if uid is not None:
        import os; os.setegid(0); os.seteuid(uid)
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if uid is not None:
        os.seteuid(0)
    if mark:
        made.setsockopt(socket.SOL_SOCKET, 36, mark)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    made.bind(("192.168.7.2", port))
    return made

sh("ip tuntap add wg0 mode tun", "ip link set wg0 up", "ip route add default dev wg0 table 42")
"""
TELLS = "sh('ip rule add pref 900 not fwmark 7777 table 42')\n"  # what makes the watch able to tell at all


async def told(rules: str, script: str, **make: object) -> dict[str, object]:
    arguments = ", ".join(f"{k}={v!r}" for k, v in make.items())
    return await ran(
        f"{TUNNEL}\nsh(*{rules.splitlines()!r})\nwatch = make({arguments})\n{script}\n"
        "send('203.0.113.99', 9, by=udp())\n"  # an ordinary program's, behind them
        "await until(lambda: any(str(e.destination) == '203.0.113.99' for e in acted))\n"
        "say(on=watch.on, to=sorted(str(e.destination) for e in acted))"
    )


EXCEPTED = {
    "a mark that a rule above the tunnel's lets out": (
        "ip rule add pref 500 fwmark 0x80000/0xff0000 lookup main\nip rule add pref 900 table 42",
        "send('203.0.113.1', 3478, by=udp(mark=0x80000)); send('203.0.113.2', 3478, by=udp(mark=0x10000))",
    ),
    "a port of its own": (
        "ip rule add pref 500 ipproto udp sport 51820 lookup main\nip rule add pref 900 table 42",
        "send('203.0.113.1', 3478, by=udp(port=51820)); send('203.0.113.2', 51820, by=udp(port=51821))",
    ),
    "a mark with a protocol": (
        "ip rule add pref 500 fwmark 5 ipproto udp lookup main\nip rule add pref 900 table 42",
        "send('203.0.113.1', 3478, by=udp(mark=5)); send('203.0.113.2', 3478, by=udp(mark=6))",
    ),
    "the mark of the tunnel's own rule, not another table's": (
        "ip rule add pref 900 not fwmark 7 table 42\nip rule add pref 901 not fwmark 8 table 43",
        "send('203.0.113.1', 3478, by=udp(mark=7)); send('203.0.113.2', 3478, by=udp(mark=8))",
    ),
    "a protocol without ports": (
        "ip rule add pref 500 ipproto esp lookup main\nip rule add pref 900 table 42",
        "esp = socket.socket(socket.AF_INET, socket.SOCK_RAW, 50)\n"
        "gre = socket.socket(socket.AF_INET, socket.SOCK_RAW, 47)\n"
        "for s, to in ((esp, '203.0.113.1'), (gre, '203.0.113.2')):\n"
        "    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0'); s.sendto(b'x' * 40, (to, 0))",
    ),
}


@pytest.mark.parametrize(("rules", "script"), EXCEPTED.values(), ids=EXCEPTED.keys())
async def test_what_excepts_itself_by_its_sender_is_none_and_another_program_beside_it_is_told(
    rules: str, script: str
) -> None:
    seen = await told(rules, script, endpoints=())
    assert seen["on"] is True
    assert seen["to"] == ["203.0.113.2", "203.0.113.99"]


async def test_a_rule_that_comes_between_two_looks_is_known_before_its_packet_is_told() -> None:
    """A program makes one rule after another, and sends: news of the first are read, those of the second not yet."""
    seen = await told(
        "ip rule add pref 900 table 42",
        "sh('ip rule add pref 400 fwmark 6 lookup main'); kernel.changed(); watch.update(around())\n"
        "sh('ip rule add pref 500 fwmark 0x80000/0xff0000 lookup main')\n"
        "send('203.0.113.1', 3478, by=udp(mark=0x80000)); await asyncio.sleep(0.4)",
    )
    assert seen["to"] == ["203.0.113.99"]


async def test_a_rule_that_comes_right_after_a_look_is_known_before_its_packet_is_told() -> None:
    """The look found nothing new, and the news of the rule come after the packet."""
    seen = await told(
        "ip rule add pref 900 table 42",
        "watch.update(around()); sh('ip rule add pref 500 fwmark 0x80000/0xff0000 lookup main')\n"
        "send('203.0.113.1', 3478, by=udp(mark=0x80000)); await asyncio.sleep(0.4)",
    )
    assert seen["to"] == ["203.0.113.99"]


async def test_a_users_rule_that_comes_right_after_a_look_is_known_before_its_packet_is_told() -> None:
    seen = await as_root(
        "ip rule add pref 900 table 42",
        "a, b = udp(uid=993), udp(uid=997)\n"
        "watch.update(around()); sh('ip rule add pref 500 uidrange 990-995 lookup main')\n"
        "send('203.0.113.1', by=a); send('203.0.113.2', by=b); await until(lambda: acted)",
    )
    assert seen["to"] == ["203.0.113.2"]


async def test_a_marked_packet_that_is_read_after_its_rule_is_none() -> None:
    """It left by the rule, before the watch had a filter that tells its mark: the news of the rule are read first."""
    seen = await told(
        "ip rule add pref 900 table 42",
        "sh('ip rule add pref 500 fwmark 0x80000/0xff0000 lookup main')\n"
        "send('203.0.113.1', 3478, by=udp(mark=0x80000)); kernel.changed(); watch.update(around())\n"
        "await until(lambda: '203.0.113.1' in came); send('203.0.113.2', 3478, by=udp()); await asyncio.sleep(0.4)",
    )
    assert seen["to"] == ["203.0.113.2", "203.0.113.99"]


async def test_a_mark_s_rule_excuses_nothing_after_the_clock_was_set_back() -> None:
    seen = await told(
        "ip rule add pref 900 table 42",
        "clock.wall = lambda: time.time() + 3600\n"
        "sh('ip rule add pref 500 fwmark 0x80000/0xff0000 lookup main'); kernel.changed(); watch.update(around())\n"
        "clock.wall = time.time; send('203.0.113.2', 3478, by=udp()); await asyncio.sleep(0.4)",
    )
    assert seen["to"] == ["203.0.113.2", "203.0.113.99"]


async def test_what_a_rule_selects_by_destination_alone_stays_a_leak() -> None:
    rules = "ip rule add pref 500 to 203.0.113.1 lookup main\n"
    rules += "ip rule add pref 501 ipproto udp dport 3478 lookup main\nip rule add pref 900 table 42"
    seen = await told(rules, "send('203.0.113.1', by=udp()); send('203.0.113.2', 3478, by=udp())")
    assert seen["to"] == ["203.0.113.1", "203.0.113.2", "203.0.113.99"]


TWO_USERS = """
a, b = udp(uid=993), udp(uid=997)
send("203.0.113.1", by=a); send("203.0.113.2", by=b)
await until(lambda: acted)
"""


async def as_root(rules: str, script: str, **make: object) -> dict[str, Any]:
    """A user namespace with one user has no other to send as: these take a network namespace alone."""
    arguments = ", ".join(f"{k}={v!r}" for k, v in make.items())
    return await ran(
        f"{TUNNEL}\nsh(*{rules.splitlines()!r})\nwatch = make({arguments})\n{script}\n"
        "say(on=watch.on, to=sorted(str(e.destination) for e in acted))",
        users=True,
    )


async def test_a_lease_is_renewed_by_the_system_and_whatever_else_goes_to_that_port_is_told() -> None:
    seen = await as_root(
        "ip rule add pref 900 table 42",
        # The client of an ISP whose server has a public address.
        "asks = b'\\1' + bytes(235) + b'\\x63\\x82\\x53\\x63\\x35\\1\\3\\xff'\n"
        "with udp(port=68) as client:\n"
        "    send('203.0.113.1', 67, asks, by=client); await asyncio.sleep(0.5)\n"
        "    send('203.0.113.2', 67, b'data', by=client); await until(lambda: acted)\n"
        "a, b = udp(), udp(uid=1500, port=68); send('203.0.113.3', 67, asks, by=a)\n"
        "send('203.0.113.4', 67, asks, by=b); await until(lambda: len(acted) > 2)",
    )
    assert seen["to"] == ["203.0.113.2", "203.0.113.3", "203.0.113.4"]


FROM_THE_TUNNEL = """
from tests.agent.leakwatch.bytes import ip, tcp, udp as datagram
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
raw.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
def goes_on(protocol, data, to="203.0.113.1"):
    raw.sendto(ip("10.8.0.2", to, protocol, data)[1], (to, 0))
"""


async def test_whose_packet_it_was_is_told() -> None:
    seen = await ran(
        f"{TUNNEL}\nsh('ip rule add pref 900 table 42')\nwatch = make()\n"
        "persons = udp(uid=1500); send('203.0.113.1', 9, by=persons); await until(lambda: acted)\n"
        "say(to=[acted[0].user])",
        users=True,
    )
    assert seen["to"] == [1500]


async def test_what_goes_to_the_server_with_the_tunnels_address_is_told_unless_a_connection_goes_on() -> None:
    seen = await told(
        "ip rule add pref 900 table 42",
        f"{FROM_THE_TUNNEL}\ngoes_on(6, tcp(4000, 443, 0x10)); goes_on(6, tcp(4000, 443, 0x11))\n"
        "send('203.0.113.98', 9, by=udp()); await until(lambda: acted)\n"
        "goes_on(17, datagram(4001, 9999)); await until(lambda: len(acted) > 1)",
        server=("203.0.113.1",),
    )
    assert seen["to"] == ["203.0.113.1", "203.0.113.98", "203.0.113.99"]


SHAPED = {
    "WireGuard": (51820, "b'\\1' + bytes(3) + b'h' * 144"),
    "OpenVPN": (1194, "b'\\x38' + b's' * 8 + bytes(5)"),
    "IKE": (500, "b's' * 8 + bytes(9) + b'\\x20\\x22\\x08' + bytes(6) + b'\\0\\x1c'"),
}


@pytest.mark.parametrize(("port", "payload"), SHAPED.values(), ids=SHAPED.keys())
async def test_a_vpns_packet_by_its_shape_is_none_and_lets_no_other_program_out(port: int, payload: str) -> None:
    seen = await as_root(
        "ip rule add pref 900 table 42",
        f"vpn, other = udp(port={port}), udp(port=4001)\n"
        f"send('203.0.113.1', {port}, {payload}, by=vpn); await asyncio.sleep(0.2)\n"
        f"send('203.0.113.1', {port}, b'data', by=vpn); send('203.0.113.2', 9, by=other); await until(lambda: acted)\n"
        f"send('203.0.113.1', {port}, b'hello', by=other); await until(lambda: len(acted) > 1)",
    )
    assert seen["to"] == ["203.0.113.1", "203.0.113.2"]


@pytest.mark.parametrize(("port", "payload"), SHAPED.values(), ids=SHAPED.keys())
async def test_what_a_persons_program_shapes_like_a_vpns_packet_is_told(port: int, payload: str) -> None:
    seen = await as_root(
        "ip rule add pref 900 table 42",
        f"persons = udp(uid=1500); send('203.0.113.1', {port}, {payload}, by=persons); await until(lambda: acted)",
    )
    assert seen["to"] == ["203.0.113.1"]


async def test_a_user_that_a_rule_lets_out_is_none_and_another_user_is_told() -> None:
    seen = await as_root(
        "ip rule add pref 500 uidrange 990-995 lookup main\nip rule add pref 900 table 42",
        TWO_USERS,
        endpoints=(),
    )
    assert seen == {**seen, "on": True, "to": ["203.0.113.2"]}


# Sockets that are gone when the watch reads their packets: it runs when all this is done.
CLOSED = """
import os
def once(uid, to, kind=socket.SOCK_DGRAM, device=b"", near="", mark=0):
    os.setegid(0); os.seteuid(uid)
    made = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    os.seteuid(0)
    if mark:
        made.setsockopt(socket.SOL_SOCKET, 36, mark)
    if device:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
    if near:
        made.bind((near, 0))
    os.seteuid(uid)  # TCP's first packet is of whoever connects
    if kind == socket.SOCK_DGRAM:
        made.sendto(b"x", (to, 514))
    else:
        made.connect_ex((to, 514))
    made.close()
    os.seteuid(0)
TCP = socket.SOCK_STREAM
"""
LED_OUT = "ip rule add pref 500 uidrange 990-995 lookup main\nip rule add pref 900 table 42"


async def test_a_socket_that_is_closed_at_once_tells_by_how_it_was_bound_whether_a_rule_led_it_out() -> None:
    seen = await as_root(
        LED_OUT,
        CLOSED + "once(993, '203.0.113.1'); once(993, '203.0.113.3', TCP); once(997, '203.0.113.5')\n"
        "once(997, '203.0.113.2', device=b'eth0'); once(0, '203.0.113.4', TCP, device=b'eth0')\n"
        "await until(lambda: len(acted) == 2); await asyncio.sleep(0.3)",
        endpoints=(),
    )
    assert seen["to"] == ["203.0.113.2", "203.0.113.4"]


@pytest.mark.parametrize("kind", ["SOCK_DGRAM", "SOCK_RAW"])
async def test_a_ping_of_a_user_that_a_rule_lets_out_is_none_and_another_users_is_told(kind: str) -> None:
    seen = await as_root(
        LED_OUT,
        f"""
import os, pathlib
pathlib.Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2000")
ECHO = bytes([8, 0, 0xF7, 0xFF - 7, 0, 7, 0, 0])
def ping(uid, to, device=b""):
    made = socket.socket(socket.AF_INET, socket.{kind}, socket.IPPROTO_ICMP)
    os.fchown(made.fileno(), uid, -1)  # as one that a program opened before it gave up its rights
    if device:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
    made.sendto(ECHO, (to, 0))
    return made
a = ping(993, "203.0.113.1")
await until(lambda: "203.0.113.1" in came)
await turns()
first = len(acted)
a.sendto(ECHO, ("203.0.113.1", 0)); a.close()  # the last of several
await until(lambda: came.count("203.0.113.1") == 2)
b = ping(997, "203.0.113.2", b"eth0")
await until(lambda: len(acted) > first)
""",
        endpoints=(),
    )
    assert seen["to"] == ["203.0.113.2"]


async def test_many_sockets_that_are_closed_at_once_are_none() -> None:
    seen = await as_root(
        LED_OUT,
        CLOSED + "for n in range(240):\n    once(993, '203.0.113.1')\n    if n % 20 == 0: await asyncio.sleep(0)\n"
        "await until(lambda: watch._unowned)\n"
        "await until(lambda: not watch._unowned); once(0, '203.0.113.2', device=b'eth0')\n"
        "await until(lambda: acted)",
        endpoints=(),
    )
    assert seen["to"] == ["203.0.113.2"]


async def test_which_sockets_end_is_heard_only_while_packets_are_watched_and_a_rule_lets_a_user_out() -> None:
    seen = await ran(
        f"""{TUNNEL}
def hears():
    kernel.changed(); watch.update(around())
    return watch._users._closed is not None
sh('ip rule add pref 900 table 42')
watch = make()
without = hears()
sh('ip rule add pref 500 uidrange 990-995 lookup main')
within = hears()
off = make(wanted=False)
watch.close()
say(seen=[without, within, watch._users._closed is None, off._users._closed is None])
""",
        users=True,
    )
    assert seen["seen"] == [False, True, True, True]


OTHER_WAYS = {
    "an address that a rule lets out": ("ip rule add pref 600 from 192.168.7.2 lookup main", "near='192.168.7.2'"),
    "a rule for everybody's users": ("ip rule add pref 600 uidrange 1000-60000 lookup main", "uid=1000"),
    "a mark that a rule for a port lets out": (
        "ip rule add pref 600 fwmark 5 dport 514 uidrange 0-60000 lookup main",
        "mark=5",
    ),
}


@pytest.mark.parametrize(("rule", "how"), OTHER_WAYS.values(), ids=OTHER_WAYS.keys())
async def test_a_socket_that_is_closed_at_once_is_told_where_another_rule_may_have_led_it_out(
    rule: str, how: str
) -> None:
    seen = await as_root(
        f"{LED_OUT}\n{rule}",
        CLOSED + f"once(**{{**dict(uid=0, to='203.0.113.2'), **dict({how})}}); await until(lambda: acted)",
        endpoints=(),
    )
    assert seen["to"] == ["203.0.113.2"]


async def test_a_socket_that_is_closed_at_once_while_the_routes_change_is_told() -> None:
    """Its packet left while the way into the tunnel was gone; a moment later it is back."""
    seen = await as_root(
        LED_OUT,
        CLOSED + "sh('ip rule del pref 900'); once(0, '203.0.113.2'); kernel.changed(); watch.update(around())\n"
        "sh('ip rule add pref 900 table 42'); kernel.changed(); watch.update(around())\n"
        "await until(lambda: acted)",
        endpoints=(),
    )
    assert seen["to"] == ["203.0.113.2"]


@pytest.mark.parametrize("killed", [False, True])
async def test_behind_a_kill_switch_a_socket_that_is_closed_at_once_is_no_leak_while_the_tunnel_is_down(
    *, killed: bool
) -> None:
    """Only who is let out gets out there."""
    seen = await as_root(
        LED_OUT,
        CLOSED + f"watch._refused_families = {{4}} if {killed} else set()\n"
        "sh('ip link set wg0 down'); kernel.changed(); watch.update(around()); clock.now += 5\n"
        "once(993, '203.0.113.1'); once(0, '203.0.113.2', device=b'eth0')\n"
        "await until(lambda: '203.0.113.2' in [str(e.destination) for e in acted])",
        endpoints=("198.51.100.7:51820",),
    )
    assert ("203.0.113.1" in seen["to"]) is not killed


async def test_where_the_tunnel_is_one_users_alone_only_that_ones_packets_are_told() -> None:
    seen = await as_root(
        "ip rule add pref 500 uidrange 997-997 lookup 42",
        TWO_USERS.replace("uid=993", ""),
    )
    assert seen["to"] == ["203.0.113.2"]


@pytest.mark.parametrize(("words", "leak"), [("user 993", 2), ("only user 997", 2), ("only user 993", 1)])
async def test_users_that_are_declared(words: str, leak: int) -> None:
    seen = await as_root(
        "ip rule add pref 900 table 42",
        TWO_USERS,
        meant=words,
    )
    assert seen["to"] == [f"203.0.113.{leak}"]


BOUND_TCP = """
import os
def connect(uid, to):
    os.setegid(0); os.seteuid(uid)
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    os.seteuid(0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    made.connect_ex((to, 443))
    return made
a, b = connect(993, "203.0.113.1"), connect(997, "203.0.113.2")
await until(lambda: acted)
"""


async def test_a_users_connection_that_is_bound_to_a_device_is_that_users() -> None:
    """The kernel finds such a socket by its device alone."""
    seen = await as_root("ip rule add pref 900 table 42", BOUND_TCP, meant="user 993")
    assert seen["to"] == ["203.0.113.2"]


async def test_declared_ports_and_ways_out() -> None:
    seen = await told(
        "ip rule add pref 900 table 42",
        "clock.now += 10; send('203.0.113.1', 123, by=udp()); send('203.0.113.2', 124, by=udp())\n"
        "send('203.0.113.3', 5000, by=udp(port=27015)); send('203.0.113.4', 27015, by=udp(port=27016))",
        meant="port 123/udp; published 27015/udp",
    )
    assert seen["to"] == ["203.0.113.2", "203.0.113.4", "203.0.113.99"]
    off = await ran(
        f"{TUNNEL}\nwatch = make(meant='interface eth0')\nsay(watched=socket.if_nametoindex('eth0') in watch._taps)"
    )
    assert off["watched"] is False


async def test_turned_off_it_watches_nothing() -> None:
    seen = await ran(
        f"{TUNNEL}\nwatch = make(wanted=False)\nsend('203.0.113.1'); await turns()\nsay(on=watch.on, came=came)"
    )
    assert seen["on"] is None
    assert seen["came"] == []


async def test_our_own_question_is_no_leak_and_the_same_of_another_program_is() -> None:
    seen = await told(
        "ip rule add pref 900 table 42",
        "from ipaddress import ip_address\n"
        "from vpn_sentinel.agent.net.own import OwnSockets\n"
        "from vpn_sentinel.agent.probes import datagram, dns\n"
        "from vpn_sentinel.agent.probes.targets import CLOUDFLARE, OPENDNS, ServerEcho\n"
        "watch._own.sockets = OwnSockets(lambda: 0.0)  # of another process\n"
        "echo = ServerEcho(ip_address('203.0.113.7'), 9999, b'i' * 8, b'k' * 32)\n"
        "sh('ip rule add pref 1 lookup main')\n"  # whole bypass: each probe goes beside the tunnel
        "for t in (CLOUDFLARE[0], OPENDNS[0], echo):\n"
        "    payload, read = t.question()\n"
        "    to = datagram.DatagramTarget(address=t.address, port=t.port)\n"
        "    await datagram.ask(to, payload, read, limit=0.05, resend=None)\n"
        "await dns.intercepted(limit=0.05)\n"
        "await until(lambda: '192.0.2.53' in came)\n"
        "send('208.67.222.222', 53, question('myip.opendns.com'), by=udp())\n"
        "send('203.0.113.7', 9999, b'VSE1' + bytes(60), by=udp())",
    )
    assert seen["to"] == ["203.0.113.7", "203.0.113.99", "208.67.222.222"]


async def test_our_own_connections_are_known_by_their_flow() -> None:
    seen = await told(
        "ip rule add pref 900 table 42",
        "from ipaddress import ip_address\n"
        "from vpn_sentinel.agent.net.http import connected\n"
        "sh('ip rule add pref 1 lookup main')\n"
        "ours = asyncio.create_task(connected(ip_address('203.0.113.1'), 443))\n"
        "await until(lambda: '203.0.113.1' in came)\n"
        "other = socket.socket(); other.setblocking(False); other.connect_ex(('203.0.113.2', 443))\n"
        "await until(lambda: acted); ours.cancel()",
    )
    assert seen["to"] == ["203.0.113.2", "203.0.113.99"]


# The far end of the cable sends what a visitor sends; a packet socket writes it as it is.
VISITOR = """
from tests.agent.leakwatch.bytes import ip, tcp as tcp_bytes, udp as udp_bytes
def visit(protocol, rest, source="203.0.113.50"):
    far = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
    kind, data = ip(source, "192.168.7.2", protocol, rest)
    far.sendto(data, ("far", kind, 0, 0, MAC))
import fcntl, struct
probe = socket.socket(); MAC = fcntl.ioctl(probe, 0x8927, struct.pack("256s", b"eth0"))[18:24]
"""


async def test_an_answer_to_a_visitor_is_none_and_what_is_begun_from_here_is_told() -> None:
    seen = await told(
        "ip rule add pref 900 table 42\nip rule add pref 500 from 192.168.7.2 lookup main",
        VISITOR + "server = udp(port=27015); clock.now += 10\n"
        "inbound = []\nreal = watch._flows.came_in\n"
        "watch._flows.came_in = lambda p, now, passed: (inbound.append(str(p.source)), real(p, now, passed))\n"
        "visit(17, udp_bytes(5000, 27015, b'hello')); await until(lambda: inbound)\n"
        "send('203.0.113.50', 5000, by=server)\n"  # its answer
        "send('203.0.113.51', 5000, by=server)\n"  # nobody asked for that
        "send('203.0.113.50', 5001, by=server)",
    )
    assert seen["to"] == ["203.0.113.50", "203.0.113.51", "203.0.113.99"]


async def test_which_was_first_is_told_though_both_are_read_late() -> None:
    """The agent may be busy while a visitor asks and is answered; then all of it is read at once."""
    seen = await told(
        "ip rule add pref 900 table 42\nip rule add pref 500 from 192.168.7.2 lookup main",
        VISITOR + "server = udp(port=27015); clock.now += 10\n"
        "ear = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))\n"
        "ear.bind(('eth0', 0x0800)); ear.settimeout(10)\n"
        "visit(17, udp_bytes(5000, 27015, b'hello')); ear.recv(99)\n"  # a busy kernel hands it over a while later
        "send('203.0.113.50', 5000, by=server)\n"  # its answer
        "send('203.0.113.50', 5001, by=server)\n"
        "visit(17, udp_bytes(5001, 27015, b'hello'))\n"  # which answers what was begun here
        "send('203.0.113.50', 5001, by=server)",
    )
    assert seen["to"] == ["203.0.113.50", "203.0.113.99"]


async def test_a_flow_of_a_client_that_is_older_than_the_watch_is_no_visitors() -> None:
    """A program is bound to the way out; the far end, which it asked before, happens to speak first."""
    seen = await told(
        "ip rule add pref 900 table 42\nip rule add pref 500 from 192.168.7.2 lookup main",
        VISITOR + "client, server, one = udp(port=27014), udp(port=27015), udp(port=27015)\n"
        "client.connect(('203.0.113.51', 443)); one.connect(('203.0.113.50', 5000))\n"
        "inbound = []\nreal = watch._flows.came_in\n"
        "watch._flows.came_in = lambda p, now, passed: (inbound.append(str(p.source)), real(p, now, passed))\n"
        "visit(17, udp_bytes(443, 27014, b'push'), '203.0.113.51'); visit(17, udp_bytes(5000, 27015, b'hello'))\n"
        "await until(lambda: len(inbound) == 2)\n"
        "one.send(b'answer')\n"  # a server may have a socket for each visitor, beside the one that is for all
        "client.send(b'ack')",
    )
    assert seen["to"] == ["203.0.113.51", "203.0.113.99"]


# A service that sends by itself, to two who came before the watch did; the watch hears of them when they send again.
PUSHES = (
    VISITOR
    + """
from vpn_sentinel.agent.leakwatch import inbound
w.FIRST_SENDS_S = 0.3
PORT = 27015
server = udp(port=PORT)
def push(*hosts, port=5000, by=server):
    for host in hosts:
        send(f"203.0.113.{host}", port, by=by)
push(50, 51)
ear = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
ear.bind(("eth0", 0x0800)); ear.settimeout(10)
for host in (51, 50):
    visit(17, udp_bytes(5000, PORT, b"hello"), f"203.0.113.{host}"); ear.recv(99)  # a busy kernel hands it over late
await until(lambda: not watch._serving and watch._flows._maybe_old)
clock.now += 10
"""
)
SERVED = "ip rule add pref 900 table 42\nip rule add pref 500 from 192.168.7.2 lookup main"


async def test_a_service_that_sends_first_to_visitors_from_before_the_watch_is_none() -> None:
    seen = await told(
        SERVED,
        PUSHES + "push(50, 51); clock.now += 100\nvisit(17, udp_bytes(5000, PORT, b'hello')); await turns(); push(50)",
    )
    assert seen["to"] == ["203.0.113.99"]


async def test_a_program_that_goes_on_to_send_to_new_hosts_had_no_visitors_before_the_watch_either() -> None:
    """Such as a torrent client beside the tunnel: strangers send to its port, too."""
    seen = await told(SERVED, PUSHES + "push(52); await until(lambda: acted); push(50)")
    assert seen["to"] == ["203.0.113.50", "203.0.113.52", "203.0.113.99"]


PASSED_ON = PUSHES.replace(
    "server = udp(port=PORT)",
    """
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
raw.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
class Container:
    @staticmethod
    def sendto(data, to):
        raw.sendto(ip("192.168.7.2", to[0], 17, udp_bytes(PORT, to[1], data))[1], (to[0], 0))
server = Container
""",
).replace("5000", "40000")


async def test_a_containers_service_that_was_visited_before_the_watch_is_none_and_what_it_begins_is_told() -> None:
    """Its socket is in another namespace; this host passes its datagrams on."""
    seen = await told(SERVED, PASSED_ON + "push(50, 51); push(52, port=443); await until(lambda: acted)")
    assert seen["to"] == ["203.0.113.52", "203.0.113.99"]


CLIENTS = {
    "nobody comes in": ("server = udp(port=27015)", 5000),
    "a port that the kernel gave": ("server = udp()", 5000),
    "connected": ("server = udp(port=27015); server.connect(('203.0.113.50', 5000))", 5000),
    "the far end is a service": ("server = udp(port=27015)", 123),
    "both have the same port": ("server = udp(port=27015)", 27015),
    "one host, and that a service": ("server = udp(port=27015); came_back = True", 27016),
}


@pytest.mark.parametrize(("server", "far"), CLIENTS.values(), ids=CLIENTS.keys())
async def test_a_client_that_is_older_than_the_watch_is_told(server: str, far: int) -> None:
    seen = await told(
        SERVED,
        VISITOR + f"w.FIRST_SENDS_S = 0.3; came_back = False; {server}\nsend('203.0.113.50', {far}, by=server)\n"
        f"if came_back: visit(17, udp_bytes({far}, 27015, b'x'))\n"
        "await until(lambda: acted)",
    )
    assert seen["to"] == ["203.0.113.50", "203.0.113.99"]


# A listener on port 8000, and TCP packets as they are, without a socket of their own: `port` here, `far` there.
LISTENS = """
listener = socket.socket(); listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("0.0.0.0", 8000)); listener.listen()
from tests.agent.leakwatch.bytes import ip, tcp as tcp_bytes
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
raw.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
def out(to, port, flags, payload=b"", far=4444):
    raw.sendto(ip("192.168.7.2", to, 6, tcp_bytes(port, far, flags, payload))[1], (to, 0))
"""


async def test_a_port_that_takes_connections_answers_and_begins_none() -> None:
    seen = await told(
        "ip rule add pref 900 table 42",
        LISTENS + "out('203.0.113.1', 8000, 0x18, b'page'); out('203.0.113.1', 8000, 0x10)\n"  # of a connection taken
        "out('203.0.113.2', 8001, 0x18, b'page')\n"  # nobody listens there
        "out('203.0.113.3', 8000, 0x02); out('203.0.113.3', 8000, 0x18, b'page')",  # begun here, from the same port
    )
    assert seen["to"] == ["203.0.113.2", "203.0.113.3", "203.0.113.99"]


async def test_what_the_kernel_sends_for_a_service_that_was_stopped_is_an_answer() -> None:
    seen = await told(
        "ip rule add pref 900 table 42",
        LISTENS + "watch.update(around())\n"
        "listener.close()\n"
        "out('203.0.113.1', 8000, 0x11)\n"  # the end of a connection that was quiet until then
        "out('203.0.113.2', 8001, 0x11); out('203.0.113.3', 8000, 0x02)",
    )
    assert seen["to"] == ["203.0.113.2", "203.0.113.3", "203.0.113.99"]


async def test_a_connection_that_a_service_took_stays_one_whatever_becomes_of_its_listener() -> None:
    seen = await told(
        "ip rule add pref 900 table 42",
        LISTENS + "out('203.0.113.1', 8000, 0x18, b'page'); await until(lambda: '203.0.113.1' in came)\n"
        "listener.close(); clock.now += 3600\n"
        "out('203.0.113.1', 8000, 0x18, b'page'); out('203.0.113.2', 8000, 0x18, b'page')",
    )
    assert seen["to"] == ["203.0.113.2", "203.0.113.99"]


# TCP_REPAIR (linux/tcp.h, 19) makes a connection that stands, without a packet; the kernel sends an ACK when it ends.
async def test_a_session_with_a_containers_published_port_that_was_under_way_before_the_watch_is_no_leak() -> None:
    """Neither its beginning was seen nor has it a socket here; nor has what a container sends by itself."""
    seen = await told(
        "ip rule add pref 900 table 42",
        LISTENS + "out('203.0.113.1', 8080, 0x18, b'page', far=42226); out('203.0.113.1', 443, 0x10, far=1500)\n"
        "out('203.0.113.2', 43210, 0x18, b'GET', far=443)\n"
        "out('203.0.113.3', 20000, 0x18, b'GET', far=443)\n"  # masqueraded with --random-fully
        "out('203.0.113.4', 43210, 0x18, b'data', far=51413)\n"
        "sh('ip rule add pref 1 lookup main')\n"
        "own = socket.socket(); own.setsockopt(socket.IPPROTO_TCP, 19, 1); own.bind(('192.168.7.2', 5000))\n"
        "own.connect(('203.0.113.5', 42226))\n"
        "own.setsockopt(socket.IPPROTO_TCP, 19, 0)\n"  # an ACK: a program's here goes on, from a port of its choice
        "out('203.0.113.6', 8080, 0x02, far=42226)",
    )
    assert seen["to"] == [f"203.0.113.{n}" for n in (2, 3, 4, 5, 6, 99)]


async def test_a_flood_from_outside_does_not_hide_a_leak() -> None:
    seen = await told(
        "ip rule add pref 900 table 42",
        VISITOR + "for n in range(3000):\n    visit(17, udp_bytes(5000 + n % 20000, 27015, b'x'))\n",
    )
    assert seen["to"] == ["203.0.113.99"]


async def test_a_tcp_probe_of_another_program_of_ours_is_no_leak_and_the_same_of_any_other_is() -> None:
    seen = await ran("""
from ipaddress import ip_address
from vpn_sentinel.agent.net.own import OwnSockets
from vpn_sentinel.agent.probes import tag
watch = make()
def begin(bind):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as own:
        bind(own)
        own.connect_ex(("203.0.113.5", 80))
begin(lambda own: tag.bind_marked(own, ip_address("203.0.113.5")))
send("203.0.113.9")  # behind it
await until(lambda: "203.0.113.9" in came)
probed = flows(watch)
begin(lambda own: None)
await until(lambda: len(acted) > 1)
say(probed=probed, then=[str(e.destination) for e in acted])
""")
    assert seen["probed"] == [["203.0.113.9", 443, 1]]
    assert seen["then"] == ["203.0.113.9", "203.0.113.5"]
