"""Pulses against a real server's port on the loopback, and what a round learns of them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address

from tests.agent.doubles import ETH, LO, WG, FakeKernel, udp
from tests.conftest import until
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.agent.probes.mtu import MtuProbe, MtuResult, search
from vpn_sentinel.agent.probes.targets import ServerEcho
from vpn_sentinel.agent.sensors.pulse import PulseSensor
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Probe, Trigger
from vpn_sentinel.wire import echo, pulse

SECRET = b"s" * 32
IDENT = echo.ident_for(SECRET, "nl")
KEY = echo.key_for(SECRET, IDENT)
HERE = ip_address("127.0.0.1")
TUNNEL = Paths(FakeKernel(), Survey(interfaces=(LO, WG), tunnel="wg0"))


@dataclass
class Server:
    """Answers genuine pulses as coming from `seen`, unless it is deaf."""

    port: int = 0
    seen: str = "185.65.134.10"
    deaf: bool = False
    loses: frozenset[int] = frozenset()
    got: list[pulse.Pulse] = field(default_factory=list)

    def answer(self, data: bytes) -> bytes | None:
        if not (pulse.is_request(data) and echo.is_genuine(data, KEY)):
            return None
        self.got.append(pulse.read(data))
        return (
            None
            if self.deaf or len(self.got) in self.loses
            else pulse.reply(data, ip_address(self.seen).packed, 1, KEY)
        )

    @property
    def target(self) -> ServerEcho:
        return ServerEcho(HERE, self.port, IDENT, KEY)


@asynccontextmanager
async def pulsing(
    rang: list[float], every: float = 0.05, acked: Callable[[], float | None] = lambda: None
) -> AsyncIterator[tuple[Server, PulseSensor]]:
    server = Server()
    loop = asyncio.get_running_loop()
    async with udp(server.answer) as (port, _):
        server.port = port
        sensor = PulseSensor(
            every,
            echoes=lambda: (server.target,),
            on_change=lambda: rang.append(loop.time()),
            acked=acked,
            boottime=loop.time,
            wall=time.time,
        )
        task = loop.create_task(sensor.run())
        try:
            yield server, sensor
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def test_pulses_go_over_one_socket_and_tell_what_was_heard() -> None:
    rang: list[float] = []
    async with pulsing(rang) as (server, sensor):
        await until(lambda: len(server.got) > 5)
        assert sensor.works() is True
        assert sensor.silent_for() < 0.3
    assert not rang
    assert [p.number for p in server.got] == list(range(1, len(server.got) + 1))
    assert {p.run for p in server.got} == {server.got[0].run}
    assert [p.heard for p in server.got[1:6]] == [1, 2, 3, 4, 5]
    assert server.got[0].silent == pulse.NEVER
    assert server.got[5].silent < 1000


async def test_a_close_look_takes_replies_when_it_sends_and_tells_round_trips_as_they_were() -> None:
    """Quick pulses go out every 0.1 s then; each finds the replies of those before it."""
    async with pulsing([], every=0.5) as (server, sensor):
        await until(lambda: len(server.got) > 2)
        server.loses = frozenset({len(server.got) + 1})
        await until(lambda: sensor.samples.looking)
        began = len(server.got)
        await until(lambda: not sensor.samples.looking, limit=20)
        looked = len(server.got) - began
        found = sensor.quality(None)
    assert looked >= 20
    assert found is not None
    assert found.rtt_ms is not None
    assert found.rtt_ms < 50


async def test_a_reply_after_a_silence_is_heard_at_once_though_a_close_look_had_begun() -> None:
    rang: list[float] = []
    async with pulsing(rang, every=1.0) as (server, sensor):
        await until(lambda: len(server.got) > 1)
        server.deaf = True
        await until(lambda: sensor.samples.looking)
        await until(lambda: len(rang) == 1)
        before = len(server.got)
        await until(lambda: len(server.got) > before)
        server.deaf = False
        await until(lambda: len(rang) == 2)
        replies = len(server.got) - before
    assert replies <= 3  # the first one that is answered, and what was on its way


async def test_a_black_hole_rings_within_a_second_and_says_since_when() -> None:
    rang: list[float] = []
    async with pulsing(rang) as (server, sensor):
        await until(lambda: len(server.got) > 5)
        server.deaf = True
        loop = asyncio.get_running_loop()
        fault = loop.time()
        await until(lambda: rang)
        silent = sensor.silent_for()
        # By three quick ones, and not by the next regular pulse; since the first that got no reply.
        assert rang[0] - fault > 0.5
        assert 0.5 < silent <= loop.time() - fault + 1.0
        assert sensor.target is None
        server.deaf = False
        await until(lambda: len(rang) == 2)
        assert sensor.silent_for() < 0.3


async def test_after_a_pause_silence_counts_from_now() -> None:
    rang: list[float] = []
    async with pulsing(rang) as (server, sensor):
        await until(lambda: len(server.got) > 5)
        server.deaf = True
        await until(lambda: rang)
        assert sensor.silent_for() > 0.3
        sensor.paused()
        assert sensor.silent_for() == 0.0
        server.deaf = False
        await until(lambda: sensor.target is not None)


async def test_another_address_rings() -> None:
    rang: list[float] = []
    async with pulsing(rang) as (server, _):
        await until(lambda: len(server.got) > 3)
        server.seen = "198.51.100.7"
        await until(lambda: rang)
    assert len(rang) == 1


async def test_a_changed_route_gets_a_new_socket() -> None:
    ports: set[object] = set()
    server = Server()

    class Noting(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: object) -> None:
            ports.add(addr)
            if answer := server.answer(data):
                self.transport.sendto(answer, addr)  # type: ignore[attr-defined]

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Noting, local_addr=("127.0.0.1", 0))
    server.port = transport.get_extra_info("sockname")[1]
    rang: list[float] = []
    ways = ["wg0"]
    sensor = PulseSensor(
        0.05, echoes=lambda: (server.target,), on_change=lambda: rang.append(1), route=lambda *_: ways[-1]
    )
    task = loop.create_task(sensor.run())
    await until(lambda: len(server.got) > 3)
    assert len(ports) == 1
    ways.append("eth0")  # the kernel's word of it is still on its way: no pulse may go on by the old flow
    await until(lambda: len(ports) == 2)
    sensor.reset()
    assert sensor.canary(TUNNEL) is None  # what came before the change proves nothing after it
    await until(lambda: len(ports) == 3)
    await until(lambda: sensor.canary(TUNNEL) is not None)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    transport.close()
    assert not rang


async def test_a_server_without_an_echo_is_refused_and_rings() -> None:
    rang: list[float] = []
    async with udp(lambda _: None) as (port, _):
        gone = port
    sensor = PulseSensor(0.05, echoes=lambda: (ServerEcho(HERE, gone, IDENT, KEY),), on_change=lambda: rang.append(1))
    task = asyncio.get_running_loop().create_task(sensor.run())
    await until(lambda: rang)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert sensor.canary(TUNNEL) is None


async def test_a_reply_of_just_now_is_a_canary_of_the_round() -> None:
    async with pulsing([]) as (server, sensor):
        await until(lambda: len(server.got) > 3)
        await until(lambda: sensor.canary(TUNNEL) is not None)
        seen = sensor.canary(TUNNEL)
        assert seen is not None
        assert (seen.target, seen.answer, str(seen.address)) == ("pulse", Answer.ANSWERED, server.seen)
        assert seen.path is Path.TUNNEL
        outside = Paths(FakeKernel(default=2), Survey(interfaces=(LO, ETH, WG), tunnel="wg0", beside=(ETH,)))
        gone = Paths(FakeKernel(), Survey(interfaces=(LO, ETH), tunnel="wg0"))
        assert sensor.canary(outside) is None
        assert sensor.canary(gone) is None


def saw(*answers: tuple[str, Answer]) -> Observation:
    canaries = tuple(Canary(probe=Probe.DEFAULT, target=t, family=4, answer=a) for t, a in answers)
    return Observation(trigger=Trigger.TIMER, canaries=canaries)


async def test_udp_that_does_not_reach_the_server_is_told_once_reports_do() -> None:
    acked: list[float | None] = [None]
    async with pulsing([], acked=lambda: acked[0]) as (server, sensor):
        server.deaf = True
        assert sensor.works() is None
        sensor.saw(saw(("echo", Answer.LOST), ("cloudflare", Answer.ANSWERED)))
        assert sensor.works() is None  # the server may be down
        await asyncio.sleep(0.01)
        acked[0] = asyncio.get_running_loop().time()
        assert sensor.works() is False
        server.deaf = False
        sensor.saw(saw(("echo", Answer.ANSWERED), ("cloudflare", Answer.ANSWERED)))
        await until(lambda: sensor.works() is True)


async def test_quality_holds_what_is_known() -> None:
    async with pulsing([]) as (server, sensor):
        assert sensor.quality(None) is None
        await until(lambda: len(server.got) > 30)
        sensor.mtu = 1420
        found = sensor.quality(Link(name="wg0", present=True, up=True))
        assert found is not None
        assert (found.lost, found.mtu, found.vanished) == (0, 1420, None)
        assert 0 < found.sent < 20
        assert found.rtt_ms is not None


# --- the path's MTU ---------------------------------------------------------------------------------------------------


class Pipe:
    """A path that lets packets up to `passes` through; from `told` on somebody says that they are too large."""

    def __init__(self, passes: int, told: int = 10_000) -> None:
        self.passes, self.told = passes, told
        self.asked: list[int] = []

    async def ask(self, size: int) -> Answer:
        self.asked.append(size)
        if size > self.told:
            return Answer.UNREACHABLE
        return Answer.ANSWERED if size <= self.passes else Answer.LOST


async def test_a_path_that_carries_it_all_costs_one_packet() -> None:
    pipe = Pipe(1500)
    assert await search(pipe.ask, 1420, 4) == MtuResult(1420)
    assert pipe.asked == [1420]


async def test_a_black_hole_is_measured() -> None:
    for passes in range(600, 1420, 37):
        pipe = Pipe(passes)
        found = await search(pipe.ask, 1420, 4)
        assert found.vanished == 1420
        assert found.mtu is not None
        assert passes - 12 <= found.mtu <= passes
        assert len(pipe.asked) <= 3 + 1 + 14 + 5


async def test_who_is_told_sends_less_and_is_in_no_black_hole() -> None:
    found = await search(Pipe(1300, told=1300).ask, 1420, 4)
    assert found.vanished is None
    assert found.mtu is not None
    assert 1288 <= found.mtu <= 1300


async def test_where_nothing_passes_size_is_not_the_matter() -> None:
    assert await search(Pipe(0).ask, 1420, 4) == MtuResult()


async def test_loss_is_no_black_hole() -> None:
    class Lossy(Pipe):
        async def ask(self, size: int) -> Answer:
            await super().ask(size)
            return Answer.LOST if len(self.asked) < 5 and size == 1420 else Answer.ANSWERED

    assert await search(Lossy(1420).ask, 1420, 4) == MtuResult(1420)


async def test_packets_of_a_size_reach_a_real_port() -> None:
    server = Server()
    async with udp(server.answer) as (port, _):
        server.port = port
        numbers = iter(range(1, 10))

        def numbered(target: ServerEcho, size: int) -> tuple[int, int, bytes]:
            number = next(numbers)
            return 9, number, pulse.request(target.ident, target.key, run=9, number=number, size=size)

        with MtuProbe(server.target, numbered) as sizer:
            assert sizer.largest(65536) == 1500
            assert await sizer.ask(1420, 2.0) is Answer.ANSWERED
            server.deaf = True
            assert await sizer.ask(1420, 0.05) is Answer.LOST
    assert [p.sized for p in server.got] == [True, True]


def test_the_kernel_tells_an_interfaces_mtu() -> None:

    kernel = Netlink()
    try:
        assert next(i.mtu for i in kernel.interfaces() if i.name == "lo") >= 1500
    finally:
        kernel.close()
