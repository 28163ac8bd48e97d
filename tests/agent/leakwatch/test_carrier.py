"""Which of several hosts carries the tunnel: told by sizes, kept for one device, tried again when in doubt."""

import asyncio
from ipaddress import ip_address

import pytest

from tests.agent.leakwatch.test_watch import ran
from tests.conftest import ManualClock
from vpn_sentinel.agent.endpoints import TCP, Endpoint
from vpn_sentinel.agent.interfaces import Recollection
from vpn_sentinel.agent.leakwatch.carrier import Carrier, Outer, carried
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.domain.policy import IPAddress

SERVER = Endpoint(ip_address("198.51.100.7"), 443)
OTHER = Endpoint(ip_address("203.0.113.5"), 443, TCP)
SIZES = [520, 130, 940, 330, 730, 240]
HOSTS = (SERVER.address, OTHER.address)
TUN = Interface(index=7, name="tun0", kind="tun", hardware=65534, flags=1, addresses=(ip_address("10.8.0.2"),))


def follow(end: Endpoint, *wraps: int | None) -> list[Outer]:
    return [Outer(end, SIZES[i] + wrap, i) for i, wrap in enumerate(wraps) if wrap is not None]


CASES = {
    "followed each time": (follow(SERVER, *[81] * 6), SERVER),
    "padded by blocks": (follow(SERVER, 81, 96, 85, 91, 81, 90), SERVER),
    "one lost its packet": (follow(SERVER, 81, None, 81, 81, 81, 81), SERVER),
    "its first was late": (follow(SERVER, None, 81, 81, 81, 81, 81), None),
    "two lost": (follow(SERVER, 81, None, 81, None, 81, 81), None),
    "another chats meanwhile": (
        [*follow(SERVER, *[81] * 6), *[Outer(OTHER, 200, i) for i in range(6) for _ in range(5)]],
        SERVER,
    ),
    "only one that chats": ([Outer(OTHER, size, i) for i in range(6) for size in (90, 400, 1100)], None),
    "one that sends all sizes": (
        [*follow(SERVER, *[81] * 6), *[Outer(OTHER, s, i) for i in range(6) for s in range(60, 1200, 4)]],
        None,
    ),
    "nothing": ([], None),
}


@pytest.mark.parametrize(("seen", "found"), CASES.values(), ids=CASES.keys())
def test_what_carries_the_tunnel_follows_each_probe_by_its_size(seen: list[Outer], found: Endpoint | None) -> None:
    assert carried(SIZES, seen) == found


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


def make(search: Tries, memory: Recollection | None = None) -> tuple[Carrier, ManualClock]:
    clock = ManualClock()
    return Carrier(memory=memory or Recollection(), now=clock.boottime, search=search), clock


def test_one_host_is_tried_by_nobody_and_several_are_all_believed_until_it_is_known() -> None:
    found, _ = make(Tries(SERVER))
    found.look(TUN, HOSTS[:1], ("eth0",), able=True)
    assert (found.open, found.server) == (False, SERVER.address)
    found.look(TUN, HOSTS, ("eth0",), able=True)
    assert (found.open, found.server) == (True, None)
    asyncio.run(found.settle())
    assert (found.open, found.found, found.server, found.sure) == (False, SERVER, SERVER.address, True)


def test_another_device_or_host_begins_anew_and_a_tunnel_that_is_gone_tells_nothing() -> None:
    found, _ = make(Tries(SERVER, SERVER))
    found.look(TUN, HOSTS, ("eth0",), able=True)
    asyncio.run(found.settle())
    found.look(Interface(index=8, name="tun0", kind="tun", hardware=65534, flags=1), HOSTS, ("eth0",), able=True)
    assert found.server is None
    asyncio.run(found.settle())
    assert found.server == SERVER.address
    found.look(None, HOSTS, ("eth0",), able=True)
    assert found.server is None


def test_it_is_given_up_only_when_it_fails_twice() -> None:
    search = Tries(SERVER, None, SERVER, None, None)
    found, clock = make(search)
    found.look(TUN, HOSTS, ("eth0",), able=True)
    asyncio.run(found.settle())
    clock.now += 60.0
    assert not found.sure
    asyncio.run(found.settle())
    assert found.server == SERVER.address
    asyncio.run(found.settle())
    assert (found.server, search.asked) == (None, 5)


def test_without_the_capability_the_host_that_was_there_first_is_remembered() -> None:
    memory = Recollection()
    found, _ = make(Tries(), memory)
    found.look(TUN, HOSTS[:1], ("eth0",), able=False)
    again, _ = make(Tries(), memory)  # the agent was started again
    again.look(TUN, HOSTS, ("eth0",), able=False)
    assert (again.open, again.server) == (False, SERVER.address)
    again.look(Interface(index=9, name="tun0", kind="tun", hardware=65534, flags=1), HOSTS, ("eth0",), able=False)
    assert again.server is None  # made anew: it may go to another server


def test_a_refusal_is_no_answer() -> None:
    found, _ = make(Tries(PermissionError(1, "no"), OSError(19, "gone")))
    found.look(TUN, HOSTS, ("eth0",), able=True)
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
await until(lambda: watch.carrier.sure)
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
