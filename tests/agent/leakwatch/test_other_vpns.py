"""A corporate VPN beside the tunnel, whose packets look like anybody's: on a real TUN device, and in words."""

from tests.agent.leakwatch.test_watch import ran
from tests.conftest import ManualClock
from vpn_sentinel.agent.leakwatch.other_vpns import RETRY_S, OtherVpns
from vpn_sentinel.agent.net.endpoints import parse_endpoint
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.domain.policy import IPAddress

SERVER = parse_endpoint("203.0.113.5:443")
DEVICE = Interface(index=7, name="tun5", kind="tun", hardware=65534, flags=0x11)

# Its program reads the device and sends what it reads to its server, as OpenConnect does over DTLS and TLS; the main
# tunnel is told by its endpoint, as WireGuard is.
CORPORATE = """
global around
import fcntl, os, struct
def tun(name):
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH", name, 0x1001))  # TUNSETIFF: IFF_TUN | IFF_NO_PI
    return fd
main = tun(b"wg0")
def lines(*some):
    for line in some:
        subprocess.run(["ip", *line.split()], check=True)
    kernel.changed()
lines("addr add 10.8.0.2/24 dev wg0", "link set wg0 up", "route add 0.0.0.0/1 dev wg0", "route add 128.0.0.0/1 dev wg0",
      "route add 198.51.100.7/32 via 192.168.7.1", "route add 203.0.113.5/32 via 192.168.7.1",
      "route add 203.0.113.9/32 via 192.168.7.1")
def corporate():
    global fd
    fd = tun(b"tun5")
    lines("addr add 10.66.0.2/32 dev tun5", "link set tun5 up", "route add 10.66.0.0/16 dev tun5")
    asyncio.get_running_loop().add_reader(fd, relay)
def relay():
    while True:
        try:
            send("203.0.113.5", 443, b"\\0" * 37 + os.read(fd, 2000))
        except BlockingIOError:
            return
def talk(to, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        send(to, port, b"anybody's", by=other)
"""


async def test_another_vpns_packets_are_none_and_what_goes_to_another_host_or_port_is_told() -> None:
    seen = await ran(
        CORPORATE
        + """
corporate()
watch = make()
running = asyncio.create_task(watch.others.run())
send("203.0.113.5", 443, b"like TLS")
await until(lambda: watch.others.endpoints)
send("203.0.113.5", 443, b"like TLS", times=3)
await turns()
quiet = flows(watch)
clock.now += 6.0
talk("203.0.113.9", 443)  # a host route of somebody's
talk("203.0.113.5", 4444)  # at the corporate server's own host
lines("route add 1.2.3.0/24 via 192.168.7.1")
talk("1.2.3.4", 443)  # no host of its own: told at once
await until(lambda: len(acted) == 3)
running.cancel()
say(quiet=quiet, told=flows(watch))
"""
    )
    assert seen["quiet"] == []
    assert seen["told"] == [["1.2.3.4", 443, 1], ["203.0.113.5", 4444, 1], ["203.0.113.9", 443, 1]]


async def test_what_was_told_before_its_device_stood_is_over_once_it_stands() -> None:
    """A TLS handshake by a host route looks like any program's; it is the VPN's once its device carries something."""
    seen = await ran(
        CORPORATE
        + """
watch = make()
running = asyncio.create_task(watch.others.run())
send("203.0.113.5", 443, b"handshake")
await until(lambda: acted)
corporate()
clock.now += 1.0
watch.update(around())
send("203.0.113.5", 443, b"data")
await until(lambda: watch.others.endpoints)
clock.now += 10.5
flows(watch)
running.cancel()
say(told=len(acted), over=flows(watch))
"""
    )
    assert (seen["told"], seen["over"]) == (1, [])


async def test_a_device_that_sends_elsewhere_explains_nothing() -> None:
    """An overlay or a nested VPN: what is sent into it makes no packet to such a host."""
    seen = await ran(
        CORPORATE
        + """
def relay():
    while True:
        try:
            os.read(fd, 2000)
        except BlockingIOError:
            return
corporate()
watch = make()
running = asyncio.create_task(watch.others.run())
send("203.0.113.5", 443, b"like TLS")
await until(lambda: acted)
running.cancel()
say(told=flows(watch), ends=len(watch.others.endpoints))
"""
    )
    assert (seen["told"], seen["ends"]) == ([["203.0.113.5", 443, 1]], 0)


async def test_each_device_is_tried_at_most_every_few_seconds() -> None:
    clock, asked, answers = ManualClock(), [], [None, SERVER, OSError(19, "gone")]

    async def search(device: Interface, _hosts: tuple[IPAddress, ...], _ways: tuple[str, ...]) -> object:
        asked.append(device.name)
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    changes: list[int] = []
    others = OtherVpns(clock.boottime, lambda: changes.append(1), search)  # type: ignore[arg-type]
    assert not others.doubts(SERVER.address)  # nothing is there that could be tried
    for found in (False, True, False):
        others.update((DEVICE,), (SERVER.address,), ("eth0",))
        assert others.doubts(SERVER.address)
        await others.settle()
        assert not others.doubts(SERVER.address)
        await others.settle()
        assert (SERVER in others.endpoints) is found
        clock.now += RETRY_S
    assert (asked, len(changes)) == (["tun5"] * 3, 6)
    others.update((), (SERVER.address,), ("eth0",))
    assert (others.endpoints, others.doubts(SERVER.address)) == ((), False)
