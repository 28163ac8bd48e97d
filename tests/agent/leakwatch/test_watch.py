"""The watch on real sockets: in a namespace of its own, with a cable whose other end is another namespace's.

A packet is in the watch's socket when `send` returns, and those of one interface come up in their order: what has come
up proves that all before it has. The watch's clock stands unless a test moves it.
"""

import asyncio
import inspect
import json
import os
import sys

import pytest

from tests.conftest import ManualClock, until

ALONE = ["unshare", "--user", "--net", "--map-root-user", sys.executable, "-c"]
ALL_USERS = ["unshare", "--net", sys.executable, "-c"]
SHARED = f"""
import asyncio, json, socket, subprocess, sys, time
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address, ip_network
from vpn_sentinel.agent.net.endpoints import parse_endpoint
from vpn_sentinel.agent.net.interfaces import Paths, survey
from vpn_sentinel.agent.leakwatch import watch as w
from vpn_sentinel.agent.leakwatch.meant import parse_meant
from vpn_sentinel.agent.net.packettime import timestamp_socket
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.domain.policy import Policy

{inspect.getsource(ManualClock)}
{inspect.getsource(until)}
until = partial(until, limit=20.0)
"""
BEGIN = """
times = timestamp_socket()  # an agent has looked at much before its first packet, a test has not
for line in ("link set lo up", "link add eth0 type veth peer name far", "link set far up", "link set eth0 up",
             "addr add 192.168.7.2/24 dev eth0", "neigh add 192.168.7.1 lladdr 02:00:00:00:00:01 dev eth0",
             "route add default via 192.168.7.1"):
    subprocess.run(["ip", *line.split()], check=True)
kernel, clock, acted, told, told_at, came, asked = Netlink(), ManualClock(), [], [], [], [], []

clock.wall = time.time  # packets have the kernel's time

def around():
    return survey(kernel, configured="wg0")

def tell(_watch):
    told.append(len(acted))
    told_at.append(asyncio.get_running_loop().time())

def decode(*raw, real=w.decode):
    packet = real(*raw)
    came.append(packet and str(packet.destination))
    return packet

w.decode = decode

def make(endpoints=("198.51.100.7:51820",), allowed=(), meant="", wanted=True, resolvers=(), server=()):
    found = w.LeakWatch(
        tables=kernel, clock=clock,
        policy=Policy(
            allowed_outside=tuple(map(ip_network, allowed)), allowed_resolvers=tuple(map(ip_network, resolvers))
        ),
        on_update=tell, survey=around, on_escape=acted.append,
        endpoints=lambda: [parse_endpoint(e) for e in endpoints], declared=parse_meant(meant), wanted=wanted,
        meant=lambda: [ip_address(a) for a in server],
        on_neighbor=lambda neighbor: asked.append(f"{neighbor.address}%{neighbor.interface}"),
        neighbor_left=lambda: asked.append("left"),
    )
    found.update(around())
    clock.now += 1.0  # that look is over
    return found

sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("192.168.7.2", 4000))

def send(to, port=443, payload=b"x", times=1, by=sock):
    for _ in range(times):
        by.sendto(payload, (to, port))

def flows(watch):
    return sorted([str(e.destination), e.destination_port, e.packets] for e in watch.escapes(Paths(kernel, around())))

def count(watch):
    return sum(packets for *_, packets in flows(watch))

def question(name):
    head = b"\\x12\\x34\\x01\\x00\\0\\1\\0\\0\\0\\0\\0\\0"
    return head + b"".join(bytes([len(p)]) + p.encode() for p in name.split(".")) + b"\\0\\0\\x10\\0\\3"

async def turns():
    for _ in range(20):
        await asyncio.sleep(0)

def say(**facts):
    print(json.dumps(facts))
"""


async def ran(script: str, *, users: bool = False) -> dict[str, object]:
    """Run it alone. `users`: as root of this machine, so that it may send as other users."""
    lines = [f"    {line}" for line in script.strip().splitlines()]
    code = "\n".join([SHARED, BEGIN, "async def main():", *lines, "asyncio.run(main())"])
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        *(ALL_USERS if users else ALONE), code, env=env, stdout=-1, stderr=-1
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    if b"unshare:" in err:
        pytest.skip(f"no namespaces here: {err.decode().strip()}")
    assert process.returncode == 0, err.decode()
    return dict(json.loads(out.splitlines()[-1]), err=err.decode())


async def test_a_packet_outside_is_told_at_once_and_what_may_leave_is_not() -> None:
    seen = await ran("""
watch = make(allowed=["203.0.113.64/26"])
send("198.51.100.7", 51820); send("192.168.7.1", 80); send("203.0.113.70"); send("10.1.1.1", 80)
send("203.0.113.5", times=3)  # behind them
await until(lambda: count(watch) >= 3)
say(on=watch.on, flows=flows(watch), told=told, source=acted[0].source_port)
""")
    assert seen["on"] is True
    assert seen["flows"] == [["203.0.113.5", 443, 3]]
    assert seen["told"] == [1]
    assert seen["source"] == 4000


async def test_canaries_that_another_program_of_ours_sends_beside_the_tunnel_are_none() -> None:
    seen = await ran("""
from ipaddress import ip_address
from vpn_sentinel.agent.probes.canary import one
from vpn_sentinel.agent.probes.targets import CLOUDFLARE
from vpn_sentinel.domain.observation import Path, Probe
watch = make()
await asyncio.gather(*(one(CLOUDFLARE[0], Path.OUTSIDE, p, "eth0") for p in (Probe.PHYSICAL, Probe.FIRST_HOP)))
send("203.0.113.5")  # behind them
await until(lambda: "203.0.113.5" in came)
beside = flows(watch)
await one(CLOUDFLARE[0], Path.OUTSIDE)  # C1: its answer tells of the leak
send("1.1.1.1", 53, question("whoami.cloudflare"))
await until(lambda: len(acted) > 1)
say(beside=beside, names=[e.name for e in acted], ports=[e.source_port for e in acted])
""")
    assert seen["beside"] == [["203.0.113.5", 443, 1]]
    assert seen["names"] == [None, "whoami.cloudflare"]  # the same question, asked by any other program
    assert seen["ports"] == [4000, 4000]


async def test_other_destinations_are_told_once_a_second() -> None:
    seen = await ran("""
watch = make()
for i in range(5):
    send(f"203.0.113.{i}")
await until(lambda: told and told[-1] == 5)
say(told=told, apart=told_at[-1] - told_at[0], acted=len(acted))
""")
    assert seen["told"] == [1, 5]
    assert isinstance(seen["apart"], float)
    assert seen["apart"] > 0.99
    assert seen["acted"] == 5


async def test_a_flood_is_read_in_small_portions_and_counted() -> None:
    seen = await ran("""
watch = make()
send("203.0.113.5", times=20000)
await until(lambda: count(watch) >= 20000)
say(flows=flows(watch), reads=len(came))
""")
    assert seen["flows"] == [["203.0.113.5", 443, 20000]]
    assert isinstance(seen["reads"], int)
    assert seen["reads"] < 2000


async def test_nothing_is_claimed_where_nothing_tells_the_tunnels_packets() -> None:
    seen = await ran("""
watch = make(endpoints=())
send("203.0.113.5"); await until(lambda: "203.0.113.5" in came)
before = [watch.on, flows(watch)]
send("203.0.113.9", 51820, bytes([1, 0, 0, 0]) + bytes(144)); await until(lambda: watch.on)
clock.now += 2 * w.REFRESH_S
send("203.0.113.9", 51820, b"any"); send("203.0.113.5"); await until(lambda: came.count("203.0.113.5") == 2)
say(before=before, on=watch.on, flows=flows(watch))
""")
    assert seen["before"] == [None, []]
    assert seen["on"] is True
    assert seen["flows"] == [["203.0.113.5", 443, 1]]
    assert "the leak watch reports nothing" in str(seen["err"])


async def test_marks_that_rules_spare_are_the_tunnels() -> None:
    seen = await ran("""
subprocess.run("ip rule add not fwmark 51820 table 51820".split(), check=True)
watch = make(endpoints=())
marked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
marked.setsockopt(socket.SOL_SOCKET, 36, 51820)
send("203.0.113.9", 51820, by=marked); send("203.0.113.9", 51820)
await until(lambda: acted)
say(on=watch.on, flows=flows(watch))
""")
    assert seen["on"] is True
    assert seen["flows"] == [["203.0.113.9", 51820, 1]]


async def test_interfaces_come_and_go() -> None:
    seen = await ran("""
watch = make()
subprocess.run("ip link add eth1 type veth peer name far1".split(), check=True)
for line in ("link set far1 up", "link set eth1 up", "addr add 192.168.8.2/24 dev eth1",
             "neigh add 192.168.8.1 lladdr 02:00:00:00:00:02 dev eth1", "route add 203.0.113.9 via 192.168.8.1"):
    subprocess.run(["ip", *line.split()], check=True)
watch.update(around())
send("203.0.113.9"); await until(lambda: acted)
by = [e.interface for e in acted]
subprocess.run("ip link set eth0 down".split(), check=True); await turns()
subprocess.run("ip link set eth0 up".split(), check=True)
subprocess.run("ip route add default via 192.168.7.1".split(), check=True)
subprocess.run("ip neigh replace 192.168.7.1 lladdr 02:00:00:00:00:01 dev eth0".split(), check=True)
subprocess.run("ip link del eth1".split(), check=True); await turns()
watch.update(around())
send("203.0.113.10"); await until(lambda: len(acted) > 1)
say(by=by, later=[e.interface for e in acted][1:])
""")
    assert seen["by"] == ["eth1"]
    assert seen["later"] == ["eth0"]


REPLACE = """
def again(*lines):
    for line in (*lines, "link set far up", "link set eth0 up", "addr add 192.168.7.2/24 dev eth0",
                 "neigh replace 192.168.7.1 lladdr 02:00:00:00:00:01 dev eth0",
                 "route replace default via 192.168.7.1"):
        subprocess.run(["ip", *line.split()], check=True)

index = socket.if_nametoindex("eth0")
watch = make()
"""


async def test_an_interface_that_was_replaced_by_one_of_the_same_name_and_number_is_watched() -> None:
    """So it is after `ip link set eth0 netns` and back, within the 50 ms for which changes are gathered."""
    seen = await ran(
        REPLACE
        + """
again("link del eth0", f"link add eth0 index {index} type veth peer name far")
assert socket.if_nametoindex("eth0") == index
watch.update(around())
send("203.0.113.5"); await until(lambda: acted)
say(on=watch.on, flows=flows(watch))
"""
    )
    assert seen["on"] is True
    assert seen["flows"] == [["203.0.113.5", 443, 1]]


async def test_an_interface_with_another_name_is_told_by_that_name() -> None:
    seen = await ran(
        REPLACE
        + """
subprocess.run("ip link set eth0 down".split(), check=True)
for line in ("link set eth0 name lan0", "link set lan0 up", "route replace default via 192.168.7.1",
             "neigh replace 192.168.7.1 lladdr 02:00:00:00:00:01 dev lan0"):
    subprocess.run(["ip", *line.split()], check=True)
watch.update(around())
send("203.0.113.5"); await until(lambda: acted)
say(on=watch.on, by=[e.interface for e in acted])
"""
    )
    assert (seen["on"], seen["by"]) == (True, ["lan0"])


async def test_out_of_descriptors_it_says_that_it_is_blind_and_comes_back() -> None:
    seen = await ran(
        REPLACE
        + """
import os, resource
again("link del eth0", "link add eth0 type veth peer name far")
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
watch.update(around()); watch.update(around())
blind = watch.on
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
watch.update(around())
send("203.0.113.5"); await until(lambda: acted)
say(blind=blind, on=watch.on, flows=flows(watch))
"""
    )
    assert (seen["blind"], seen["on"]) == (False, True)
    assert seen["flows"] == [["203.0.113.5", 443, 1]]
    assert str(seen["err"]).count("cannot be watched") == 2  # of the cable's two ends, once each in two looks


async def test_blind_on_one_way_out_it_still_tells_of_the_others() -> None:
    seen = await ran("""
import os, resource
watch = make()
subprocess.run("ip link add eth1 type veth peer name far1".split(), check=True)
for line in ("link set far1 up", "link set eth1 up", "addr add 192.168.8.2/24 dev eth1",
             "route add 203.0.113.9 via 192.168.8.1"):
    subprocess.run(["ip", *line.split()], check=True)
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
watch.update(around())
send("203.0.113.5"); await until(lambda: acted)
say(on=watch.on, flows=flows(watch))
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
""")
    assert seen["on"] is False
    assert seen["flows"] == [["203.0.113.5", 443, 1]]


async def test_a_container_with_a_macvlan_of_its_own_is_a_host_of_the_lan() -> None:
    """Its packets leave by our device too, from a hardware address that is not ours."""
    seen = await ran("""
inner = subprocess.Popen(["unshare", "--net", "sleep", "60"])
await asyncio.sleep(0.3)
for line in ("link add m0 link eth0 type macvlan mode bridge", f"link set m0 netns {inner.pid}"):
    subprocess.run(["ip", *line.split()], check=True)
enter = ["nsenter", "-t", str(inner.pid), "--net"]
for line in ("link set m0 up", "addr add 192.168.7.9/24 dev m0", "route add default via 192.168.7.1",
             "neigh add 192.168.7.1 lladdr 02:00:00:00:00:01 dev m0"):
    subprocess.run([*enter, "ip", *line.split()], check=True)
watch = make()
talk = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('203.0.113.7', 443))"
subprocess.run([*enter, sys.executable, "-c", talk], check=True)
send("203.0.113.5"); await until(lambda: acted)  # ours, behind it
before = flows(watch)
for line in ("link set eth0 address 02:00:00:00:00:77",
             "neigh replace 192.168.7.1 lladdr 02:00:00:00:00:01 dev eth0"):
    subprocess.run(["ip", *line.split()], check=True)
watch.update(around())
send("203.0.113.6"); await until(lambda: len(acted) == 2)  # ours as ever
inner.kill()
say(before=before, came=came.count("203.0.113.7"), after=len(flows(watch)))
""")
    assert seen["before"] == [["203.0.113.5", 443, 1]]
    assert seen["came"] == 0
    assert seen["after"] == 2


async def test_without_the_capability_it_says_so_once() -> None:
    seen = await ran("""
import ctypes
libc = ctypes.CDLL(None)
# prctl(2): no capability is left to this thread but those of an ordinary user.
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capset(header, none) == 0
watch = make()
watch.update(around()); watch.update(around())
say(on=watch.on, flows=flows(watch))
""")
    assert seen["on"] is False
    assert str(seen["err"]).count("packets cannot be watched here") == 1


async def test_a_nameserver_on_the_own_link_is_found_by_the_first_question_and_that_is_no_leak() -> None:
    seen = await ran("""
subprocess.run("ip addr add 169.254.7.2/16 dev eth0".split(), check=True)
subprocess.run("ip neigh add 169.254.7.1 lladdr 02:00:00:00:00:01 dev eth0".split(), check=True)
watch = make()
send("192.168.7.1", 80)
send("192.168.7.1", 53, question("nas.lan")); send("192.168.7.1", 53, question("fritz.box"))
send("192.168.7.1", 53, question("7.168.192.in-addr.arpa"))
send("192.168.7.1", 53, question("example.org"), times=3); send("169.254.7.1", 53, question("example.org"))
send("10.0.0.53", 53, question("example.org"))
send("203.0.113.5"); await until(lambda: acted)  # behind them
watch.escapes(Paths(kernel, around()))
send("192.168.7.1", 53, question("example.org")); send("203.0.113.6"); await until(lambda: len(acted) == 2)
known, up = [str(n.address) for n in watch.neighbors], came.count("192.168.7.1")
clock.now += 31.0
after = [flows(watch), [str(n.address) for n in watch.neighbors]]
send("192.168.7.1", 53, question("example.org")); await until(lambda: len(asked) > 3)
say(asked=asked, flows=flows(watch), known=known, acted=[str(e.destination) for e in acted], up=up, after=after[1])
""")
    assert seen["asked"] == ["192.168.7.1%eth0", "169.254.7.1%eth0", "10.0.0.53%eth0", "192.168.7.1%eth0"]
    assert seen["acted"] == ["203.0.113.5", "203.0.113.6"]
    assert seen["known"] == ["192.168.7.1", "169.254.7.1", "10.0.0.53"]
    assert seen["after"] == []  # nothing is good for ever
    assert seen["up"] == 6  # three of the own network, three that were there before the filter knew it, none after


async def test_the_end_of_a_leak_by_a_nameserver_on_the_own_link_is_told_when_it_comes() -> None:
    seen = await ran("""
from ipaddress import ip_address
from vpn_sentinel.agent.leakwatch import neighbors
neighbors.KEEP_ASKING_LEAKING_S = 0.3
watch = make()
send("192.168.7.1", 53, question("example.org")); await until(lambda: asked)
router = [ip_address("192.168.7.1")]
watch.judged(router, router)
up = came.count("192.168.7.1")
send("192.168.7.1", 53, question("example.org")); await until(lambda: came.count("192.168.7.1") > up)
clock.now += 0.5
await until(lambda: len(asked) > 1)
left = asked[:]
send("192.168.7.1", 53, question("example.org")); await until(lambda: len(asked) > 2)
clock.now += 0.5
await until(lambda: len(asked) > 3)
say(left=left, asked=asked)
""")
    assert seen["left"] == ["192.168.7.1%eth0", "left"]
    assert seen["asked"] == [*seen["left"], *seen["left"]]  # and no round in between had to find it out anew


@pytest.mark.parametrize(
    "meant",
    ['meant="port 53/udp"', 'resolvers=["192.168.7.1/32"]', 'allowed=["192.168.7.0/24"]', 'meant="interface eth0"'],
)
async def test_a_nameserver_on_the_own_link_that_is_meant_is_left_alone(meant: str) -> None:
    seen = await ran(f"""
watch = make({meant})
send("192.168.7.1", 53, question("example.org")); await turns()
say(asked=asked, came=came)
""")
    assert seen["asked"] == seen["came"] == []


async def test_a_name_that_an_agent_made_up_is_told_to_nobody_and_its_way_is() -> None:
    seen = await ran("""
from vpn_sentinel.agent.probes.system_resolver import fresh_names
watch = make()
for name in fresh_names(None):
    send("80.58.61.250", 53, question(name.rstrip(".")))
send("80.58.61.250", 53, question("example.org")); await until(lambda: count(watch) == 3)
say(flows=flows(watch), names=[e.name for e in watch.escapes(Paths(kernel, around()))])
""")
    names = seen["names"]
    assert isinstance(names, list)
    assert sorted(names, key=str) == [None, "example.org"]


HEALED = """
from vpn_sentinel.agent.leakwatch import flow_table as w_flow_table
for line in ("ip tuntap add wg0 mode tun", "ip link set wg0 up", "ip route add default dev wg0 table 42",
             "ip rule add pref 900 table 42", "ip route add 203.0.113.0/24 via 192.168.7.1 dev eth0 table 42"):
    subprocess.run(line.split(), check=True)
import os, fcntl, struct
tun = os.open("/dev/net/tun", os.O_RDWR); fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH", b"wg0", 0x1001))
watch = make()
bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
bound.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
send("203.0.113.5"); send("198.51.100.200", by=bound)
await until(lambda: len(acted) == 2)
subprocess.run("ip route del 203.0.113.0/24 table 42".split(), check=True)
kernel.changed()
watch.update(around())
at_once = flows(watch)
clock.now += 2.5
soon = flows(watch)
clock.now += 8
late, before = flows(watch), len(told)
send("198.51.100.200", by=bound)
await until(lambda: len(told) > before)
clock.now += w_flow_table.REPORTED_FOR_S - 0.1
flows(watch)  # the last tenth of a second runs by the loop's clock
ended = len(told)
await until(lambda: len(told) > ended)
say(at_once=at_once, soon=soon, late=late)
"""


async def test_a_leak_by_a_route_is_over_two_seconds_after_the_route_is_gone_and_a_bound_sockets_after_ten() -> None:
    seen = await ran(HEALED)
    assert seen["at_once"] == [["198.51.100.200", 443, 1], ["203.0.113.5", 443, 1]]
    assert seen["soon"] == [["198.51.100.200", 443, 1]]
    assert seen["late"] == []
