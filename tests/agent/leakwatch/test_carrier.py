"""Which host and port carry the tunnel: told by sizes, kept for one device, tried again when in doubt."""

import asyncio
from ipaddress import ip_address

import pytest

from tests.agent.leakwatch.test_watch import ran
from tests.conftest import ManualClock
from vpn_sentinel.agent.leakwatch.carrier import FRESH_S, SURE_S, Carrier, OuterPacket, carrier_of, possible_ends
from vpn_sentinel.agent.net.endpoints import TCP, Endpoint, parse_endpoint
from vpn_sentinel.agent.net.facts import InMemoryFacts
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.domain.policy import IPAddress

SERVER = Endpoint(ip_address("198.51.100.7"), 443)
OTHER = Endpoint(ip_address("203.0.113.5"), 443, TCP)
BESIDE = Endpoint(SERVER.address, 4444)  # a program's packets to the server's own host
SIZES = [520, 130, 940, 330, 730, 240]
HOSTS = (SERVER.address, OTHER.address)
TUN = Interface(index=7, name="tun0", kind="tun", hardware=65534, flags=1, addresses=(ip_address("10.8.0.2"),))


def follow(end: Endpoint, *wraps: int | None) -> list[OuterPacket]:
    return [OuterPacket(end, SIZES[i] + wrap, i) for i, wrap in enumerate(wraps) if wrap is not None]


CASES = {
    "followed each time": (follow(SERVER, *[81] * 6), SERVER),
    "padded by blocks": (follow(SERVER, 81, 96, 85, 91, 81, 90), SERVER),
    "one lost its packet": (follow(SERVER, 81, None, 81, 81, 81, 81), SERVER),
    "its first was late": (follow(SERVER, None, 81, 81, 81, 81, 81), None),
    "two lost": (follow(SERVER, 81, None, 81, None, 81, 81), None),
    "another chats meanwhile": (
        [*follow(SERVER, *[81] * 6), *[OuterPacket(OTHER, 200, i) for i in range(6) for _ in range(5)]],
        SERVER,
    ),
    "only one that chats": ([OuterPacket(OTHER, size, i) for i in range(6) for size in (90, 400, 1100)], None),
    "one that sends all sizes": (
        [*follow(SERVER, *[81] * 6), *[OuterPacket(OTHER, s, i) for i in range(6) for s in range(60, 1200, 4)]],
        None,
    ),
    "one that sends all sizes to the server's own host": (
        [*follow(SERVER, *[81] * 6), *[OuterPacket(BESIDE, s, i) for i in range(6) for s in range(60, 1200, 4)]],
        None,
    ),
    "one program's two protocols": ([*follow(SERVER, *[81] * 6), *follow(possible_ends(SERVER)[1], *[93] * 6)], SERVER),
    "nothing": ([], None),
}


@pytest.mark.parametrize(("seen", "found"), CASES.values(), ids=CASES.keys())
def test_what_carries_the_tunnel_follows_each_probe_by_its_size(
    seen: list[OuterPacket], found: Endpoint | None
) -> None:
    assert carrier_of(SIZES, seen) == found


class Tries:
    def __init__(self, *answers: Endpoint | OSError | None) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def __call__(self, tunnel: Interface, hosts: tuple[IPAddress, ...], ways: tuple[str, ...]) -> Endpoint | None:
        self.asked += 1
        answer = self._answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer


def make(search: Tries, memory: InMemoryFacts | None = None) -> tuple[Carrier, ManualClock]:
    clock = ManualClock()
    return Carrier(memory=memory or InMemoryFacts(), now=clock.boottime, search=search, is_busy=idle), clock


async def idle(_tunnel: Interface, _ends: tuple[Endpoint, ...], _ways: tuple[str, ...]) -> bool:
    return False


TWINS = {
    "OpenVPN": ("198.51.100.7:1194", "1194/tcp 1194/udp"),
    "TLS with DTLS or ESP beside it": ("198.51.100.7:443/tcp", "443/tcp 443/udp 4500/udp 4501/udp"),
    "ESP, and TLS that controls it": ("198.51.100.7:4501", "443/tcp 443/udp 4500/udp 4501/tcp 4501/udp"),
}


@pytest.mark.parametrize(("carrier", "ends"), TWINS.values(), ids=TWINS.keys())
def test_where_else_a_program_sends_while_it_carries_by_one_port(carrier: str, ends: str) -> None:
    found = possible_ends(parse_endpoint(carrier))
    assert str(found[0]) == str(parse_endpoint(carrier))
    assert sorted(str(e).partition(":")[2] for e in found) == ends.split()


def test_the_one_host_is_believed_and_several_are_all_until_it_is_known() -> None:
    found, _ = make(Tries(SERVER))
    found.update(TUN, HOSTS[:1], ("eth0",), able=True)
    assert (found.open, found.server, found.closed) == (True, SERVER.address, False)
    found.update(TUN, HOSTS, ("eth0",), able=True)
    assert (found.open, found.server, found.closed) == (True, None, False)
    asyncio.run(found.settle())
    assert (found.open, found.found, found.server, found.sure()) == (False, SERVER, SERVER.address, True)
    assert (found.closed, found.endpoints) == (True, possible_ends(SERVER))


def test_what_was_found_is_in_doubt_and_not_forgotten_where_another_host_comes() -> None:
    found, _ = make(Tries(SERVER, SERVER))
    found.update(TUN, HOSTS[:1], ("eth0",), able=True)
    asyncio.run(found.settle())
    found.update(TUN, HOSTS, ("eth0",), able=True)
    assert (found.found, found.server, found.sure(), found.closed) == (SERVER, None, False, True)
    asyncio.run(found.settle())
    assert (found.server, found.sure()) == (SERVER.address, True)
    found.update(TUN, HOSTS[1:], ("eth0",), able=True)  # its route went: the tunnel has another server
    assert (found.found, found.closed, found.open) == (None, False, True)


async def test_nothing_is_tried_again_while_nothing_changes() -> None:
    search = Tries(SERVER, SERVER)
    found, clock = make(search)
    tried = asyncio.Event()
    found.changed = tried.set
    running = asyncio.create_task(found.run())
    found.update(TUN, HOSTS[:1], ("eth0",), able=True)
    await tried.wait()
    for _ in range(50):
        clock.now += 60.0
        found.update(TUN, HOSTS[:1], ("eth0",), able=True)
        await asyncio.sleep(0)
    assert search.asked == 1
    tried.clear()
    found.doubt()
    await tried.wait()
    running.cancel()
    assert search.asked == 2


def test_who_is_told_the_ports_tries_only_when_in_doubt_and_believes_all_when_nobody_can_tell() -> None:
    search = Tries(None, None, SERVER)
    found, _ = make(search)
    found.update(TUN, HOSTS[:1], ("eth0",), able=True, reported=True)
    assert (found.open, found.closed, found.doubts(SERVER.address)) == (False, True, True)
    asyncio.run(found.settle())
    assert (found.open, found.closed, search.asked) == (True, False, 2)
    asyncio.run(found.settle())
    assert (found.open, found.closed, found.found) == (False, True, SERVER)


def test_another_device_or_host_begins_anew_and_a_tunnel_that_is_gone_tells_nothing() -> None:
    found, _ = make(Tries(SERVER, SERVER))
    found.update(TUN, HOSTS, ("eth0",), able=True)
    asyncio.run(found.settle())
    found.update(Interface(index=8, name="tun0", kind="tun", hardware=65534, flags=1), HOSTS, ("eth0",), able=True)
    assert found.server is None
    asyncio.run(found.settle())
    assert found.server == SERVER.address
    found.update(None, HOSTS, ("eth0",), able=True)
    assert found.server is None


def test_it_is_given_up_only_when_it_fails_twice() -> None:
    search = Tries(None, SERVER, None, SERVER, None, None)
    found, clock = make(search)
    found.update(TUN, HOSTS, ("eth0",), able=True)
    asyncio.run(found.settle())
    clock.now += FRESH_S
    assert (found.sure(), found.sure(SURE_S)) == (False, True)
    clock.now += 60.0
    assert not found.sure(SURE_S)
    asyncio.run(found.settle())
    assert found.server == SERVER.address
    asyncio.run(found.settle())
    assert (found.found, found.closed, search.asked) == (None, False, 6)


def test_without_the_capability_the_host_that_was_there_first_is_remembered() -> None:
    memory = InMemoryFacts()
    found, _ = make(Tries(), memory)
    found.update(TUN, HOSTS[:1], ("eth0",), able=False)
    again, _ = make(Tries(), memory)  # the agent was started again
    again.update(TUN, HOSTS, ("eth0",), able=False)
    assert (again.open, again.server) == (False, SERVER.address)
    again.update(Interface(index=9, name="tun0", kind="tun", hardware=65534, flags=1), HOSTS, ("eth0",), able=False)
    assert again.server is None  # made anew: it may go to another server


def test_a_refusal_is_no_answer() -> None:
    found, _ = make(Tries(PermissionError(1, "no"), OSError(19, "gone")))
    found.update(TUN, HOSTS, ("eth0",), able=True)
    asyncio.run(found.settle())
    assert (found.server, found.open) == (None, False)


RELAY = """
global around
import fcntl, os, struct, time
def tun():
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH", b"tun0", 0x1001))  # TUNSETIFF: IFF_TUN | IFF_NO_PI
    return fd
fd = tun()
for line in ("addr add 10.8.0.2/24 dev tun0", "link set tun0 up", "route add 0.0.0.0/1 dev tun0",
             "route add 128.0.0.0/1 dev tun0", "route add 198.51.100.7/32 via 192.168.7.1",
             "route add 203.0.113.5/32 via 192.168.7.1"):
    subprocess.run(["ip", *line.split()], check=True)
kernel.changed()
def around():
    return survey(kernel, configured="tun0")
def relay():
    while True:
        try:
            send("198.51.100.7", 443, b"\\0" * 37 + os.read(fd, 2000))
        except BlockingIOError:
            return
"""


@pytest.mark.parametrize("moved", [False, True], ids=["it stays", "it goes on to the other host"])
async def test_a_program_that_talks_to_another_host_with_a_route_of_its_own_is_told(moved: bool) -> None:
    seen = await ran(
        RELAY
        + f"""
asyncio.get_running_loop().add_reader(fd, relay)
watch = make(endpoints=())
clock.now += 5.0  # what begins in the first seconds may have been there before
send("203.0.113.5", 4242)
await turns()
before = flows(watch)
assert watch.carrier.open
await watch.carrier.settle()
found, servers = str(watch.carrier.found), [str(a) for a in watch.servers]
send("203.0.113.5", 4242, times=2)
await until(lambda: count(watch) >= 2)
told_now = flows(watch)
clock.now += 60.0
if {moved}:
    other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); other.bind(("192.168.7.2", 4001))
    def relay():
        while True:
            try:
                send("203.0.113.5", 443, b"\\0" * 37 + os.read(fd, 2000), by=other)
            except BlockingIOError:
                return
    asyncio.get_running_loop().remove_reader(fd); asyncio.get_running_loop().add_reader(fd, relay)
acted.clear()
running = asyncio.create_task(watch.carrier.run())
send("203.0.113.5", 443, b"anything")
await until(lambda: watch.carrier.sure())
running.cancel()
say(before=before, found=found, servers=servers, told=told_now, then=str(watch.carrier.found),
    acted=[str(e.destination) for e in acted])
"""
    )
    assert seen["before"] == []
    assert seen["found"] == "198.51.100.7:443/udp"
    assert seen["servers"] == ["198.51.100.7"]
    assert seen["told"] == [["203.0.113.5", 4242, 2]]
    if moved:
        assert (seen["then"], seen["acted"]) == ("203.0.113.5:443/udp", [])
    else:
        assert (seen["then"], seen["acted"]) == ("198.51.100.7:443/udp", ["203.0.113.5"])


async def test_it_is_found_while_another_program_sends_packets_of_all_sizes_to_such_hosts() -> None:
    seen = await ran(
        RELAY
        + """
import random
watch = make(endpoints=())
asyncio.get_running_loop().add_reader(fd, relay)
noise = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
async def chatter():
    while True:
        send("203.0.113.5", 4242, bytes(random.randrange(20, 1400)), by=noise[0])
        send("198.51.100.7", 4444, bytes(random.randrange(20, 1400)), by=noise[1])
        await asyncio.sleep(0.002)
talking = asyncio.create_task(chatter())
await watch.carrier.settle()
talking.cancel()
say(found=str(watch.carrier.found))
"""
    )
    assert seen["found"] == "198.51.100.7:443/udp"


ALONE_WITH_ITS_SERVER = (
    RELAY.replace(
        ', "route add 198.51.100.7/32 via 192.168.7.1",\n             "route add 203.0.113.5/32',
        ', "route add 198.51.100.7/32',
    )
    + """
def connect(to, port):
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setblocking(False)
    made.connect_ex((to, port))
    return made
asyncio.get_running_loop().add_reader(fd, relay)
bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
bound.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
bound.bind(("192.168.7.2", 4009))
"""
)


@pytest.mark.parametrize("told", ["", "198.51.100.7:443"], ids=["by its host route alone", "told by the owner"])
async def test_to_the_servers_own_host_its_port_is_none_and_another_port_is_a_leak(told: str) -> None:
    seen = await ran(
        ALONE_WITH_ITS_SERVER
        + f"""
watch = make(endpoints={[told] if told else []})
if not {bool(told)}:
    send("198.51.100.7", 4444)  # nobody knows yet which port it is
    await watch.carrier.settle()
running = asyncio.create_task(watch.carrier.run())
clock.now += 5.0
send("198.51.100.7", 443, b"its own, or like it", times=3)
kept = [connect("198.51.100.7", 443)] if not {bool(told)} else []  # beside DTLS: TLS
send("198.51.100.7", 4444)
await until(lambda: acted)
first = flows(watch)
clock.now += 5.0
kept.append(connect("198.51.100.7", 4444))
await until(lambda: len(acted) > 1)
both = [[str(e.destination), e.destination_port, e.protocol] for e in acted]
clock.now += 10.5
flows(watch)
running.cancel()
say(first=first, both=both, over=flows(watch), found=str(watch.carrier.found))
"""
    )
    assert seen["first"] == [["198.51.100.7", 4444, 1]]
    assert seen["both"] == [["198.51.100.7", 4444, "udp"], ["198.51.100.7", 4444, "tcp"]]
    assert seen["over"] == []  # the tunnel's own route to that host stays
    assert seen["found"] == "198.51.100.7:443/udp"


async def test_a_program_that_goes_on_to_another_port_of_its_server_leaks_nothing() -> None:
    seen = await ran(
        ALONE_WITH_ITS_SERVER
        + """
watch = make(endpoints=())
await watch.carrier.settle()
before = str(watch.carrier.found)
running = asyncio.create_task(watch.carrier.run())
for port in (1195, 8443):
    clock.now += 5.0
    asyncio.get_running_loop().remove_reader(fd)
    def relay():
        while True:
            try:
                send("198.51.100.7", port, b"\\0" * 53 + os.read(fd, 2000))
            except BlockingIOError:
                return
    asyncio.get_running_loop().add_reader(fd, relay)
    send("198.51.100.7", port, b"the first of another session")
    await until(lambda: watch.carrier.found and watch.carrier.found.port == port)
clock.now += 5.0
send("198.51.100.7", 443, b"left")
await until(lambda: acted)
running.cancel()
say(before=before, after=str(watch.carrier.found), told=[e.destination_port for e in acted])
"""
    )
    assert (seen["before"], seen["after"]) == ("198.51.100.7:443/udp", "198.51.100.7:8443/udp")
    assert seen["told"] == [443]


async def test_while_its_program_carries_nothing_nobody_knows_whose_packet_it_is() -> None:
    """It may be connecting anew, to another port of its server."""
    seen = await ran(
        ALONE_WITH_ITS_SERVER
        + """
watch = make(endpoints=())
await watch.carrier.settle()
asyncio.get_running_loop().remove_reader(fd)
running = asyncio.create_task(watch.carrier.run())
clock.now += 5.0
send("198.51.100.7", 1195, b"hello"); kept = connect("198.51.100.7", 8443)
await until(lambda: watch.carrier.open)
running.cancel()
send("198.51.100.7", 1196, b"hello"); send("203.0.113.9", by=bound); await until(lambda: acted)
say(on=watch.on, told=[str(e.destination) for e in acted])
"""
    )
    assert (seen["on"], seen["told"]) == (True, ["203.0.113.9"])


async def test_what_left_while_its_program_stood_still_is_told_by_nobody_and_the_next_packet_is() -> None:
    """OpenConnect does nothing else while it connects anew, to a port that need not be the one of DTLS."""
    seen = await ran(
        ALONE_WITH_ITS_SERVER
        + """
watch = make(endpoints=())
await watch.carrier.settle()
real, tries = watch.carrier.search, []
async def search(*what):
    tries.append(what)
    if len(tries) == 1:  # it goes on when the first trial is over
        asyncio.get_running_loop().remove_reader(fd)
        found = await real(*what)
        asyncio.get_running_loop().add_reader(fd, relay)
        return found
    return await real(*what)
watch.carrier.search = search
running = asyncio.create_task(watch.carrier.run())
clock.now += 5.0
kept = connect("198.51.100.7", 8443)
await until(lambda: len(tries) == 2 and watch.carrier.sure())
stood = [e.destination_port for e in acted]
clock.now += 5.0
send("198.51.100.7", 8443)
await until(lambda: acted)
running.cancel()
say(stood=stood, told=[[e.destination_port, e.protocol] for e in acted])
"""
    )
    assert (seen["stood"], seen["told"]) == ([], [[8443, "udp"]])


async def test_a_connection_to_the_servers_host_that_was_there_before_may_be_its_control_channel() -> None:
    seen = await ran(
        ALONE_WITH_ITS_SERVER
        + """
from vpn_sentinel.agent.leakwatch.tunnel_ends import CONTROL_REOPEN_S
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 6)
def tcp(source, port, flags):
    raw.sendto(struct.pack("!HHIIBBHHH", source, port, 1, 1, 0x50, flags, 64, 0, 0) + b"data", ("198.51.100.7", 0))
watch = make(endpoints=())
await watch.carrier.settle()
running = asyncio.create_task(watch.carrier.run())
clock.now += 5.0
tcp(4001, 8443, 0x18); tcp(4001, 8443, 0x11); tcp(4002, 8443, 0x02)  # it ends, and is opened anew
send("203.0.113.9", by=bound); await until(lambda: acted)
tcp(4003, 8444, 0x02)
await until(lambda: len(acted) > 1)
clock.now += CONTROL_REOPEN_S + 1
tcp(4004, 8443, 0x02)
await until(lambda: len(acted) > 2)
running.cancel()
say(told=[[str(e.destination), e.source_port] for e in acted])
"""
    )
    assert seen["told"] == [["203.0.113.9", 4009], ["198.51.100.7", 4003], ["198.51.100.7", 4004]]


async def test_a_packet_by_a_route_that_came_in_this_moment_is_told_when_the_tunnel_was_tried_again() -> None:
    seen = await ran(
        ALONE_WITH_ITS_SERVER
        + """
watch = make(endpoints=())
await watch.carrier.settle()
running = asyncio.create_task(watch.carrier.run())
clock.now += 60.0
subprocess.run("ip route add 203.0.113.5 via 192.168.7.1".split(), check=True)
send("203.0.113.5", 6881, b"hello")
await until(lambda: acted)
running.cancel()
say(told=[str(e.destination) for e in acted], servers=[str(a) for a in watch.servers])
"""
    )
    assert (seen["told"], seen["servers"]) == (["203.0.113.5"], ["198.51.100.7"])


BUSY = """
target = ["198.51.100.7", 443]
def relay():
    while True:
        try:
            send(*target, b"\\0" * 37 + os.read(fd, 2000))
        except BlockingIOError:
            return
asyncio.get_running_loop().remove_reader(fd)
asyncio.get_running_loop().add_reader(fd, relay)
upload = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
upload.setblocking(False)
async def pour():
    while True:
        for _ in range(5):
            upload.sendto(bytes(1200), ("9.9.9.9", 9))
        await asyncio.sleep(0.001)
watch = make(endpoints=())
await watch.carrier.settle()
tun0 = around().device()
pouring = asyncio.create_task(pour())
async def works():
    return await watch.carrier.is_busy(tun0, watch.carrier.endpoints, ("eth0",))
"""


async def test_a_busy_tunnel_shows_by_its_own_packets_that_it_is_at_work_and_where_it_goes() -> None:
    seen = await ran(
        ALONE_WITH_ITS_SERVER
        + BUSY
        + """
busy = await works()
target[1] = 1195
moved = await works()
target[1] = 443
asyncio.get_running_loop().remove_reader(fd)
for _ in range(10):  # somebody else's packets to that port
    send("198.51.100.7", 443, bytes(1200))
stands = await works()
asyncio.get_running_loop().add_reader(fd, relay)
pouring.cancel()
await asyncio.sleep(0.1)
say(busy=busy, moved=moved, stands=stands, idle=await works())
"""
    )
    assert [seen[k] for k in ("busy", "moved", "stands", "idle")] == [True, False, False, False]


async def test_beside_a_busy_tunnel_that_hides_probes_a_packet_to_another_port_is_told() -> None:
    seen = await ran(
        ALONE_WITH_ITS_SERVER
        + BUSY
        + """
async def search(*_):
    return None
watch.carrier.search = search
running = asyncio.create_task(watch.carrier.run())
clock.now += 5.0
send("198.51.100.7", 4444)
await until(lambda: acted)
pouring.cancel(); running.cancel()
say(told=[e.destination_port for e in acted], found=str(watch.carrier.found))
"""
    )
    assert (seen["told"], seen["found"]) == ([4444], "198.51.100.7:443/udp")
