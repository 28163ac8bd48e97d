"""The outside world of the agent's tests: real sockets on the loopback, and a kernel that answers what it is told."""

import asyncio
import selectors
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.agent.net.link import IFF_LOOPBACK, IFF_LOWER_UP, IFF_POINTOPOINT, IFF_UP, Interface
from vpn_sentinel.agent.net.roles import roles
from vpn_sentinel.agent.net.routes import Hop, RouteEntry
from vpn_sentinel.agent.net.routing_rules import Rule
from vpn_sentinel.agent.net.rtnetlink import Route
from vpn_sentinel.agent.probes.targets import EchoAnswer
from vpn_sentinel.domain.policy import IPAddress

T = TypeVar("T")

UP = IFF_UP | IFF_LOWER_UP
LO = Interface(index=1, name="lo", flags=UP | IFF_LOOPBACK, addresses=(ip_address("127.0.0.1"),))
ETH = Interface(index=2, name="eth0", kind="veth", flags=UP, addresses=(ip_address("192.168.1.20"),))
WG = Interface(
    index=3, name="wg0", kind="wireguard", flags=UP | IFF_POINTOPOINT, rx_bytes=11, tx_bytes=12,
    addresses=(ip_address("10.66.0.2"),),
)  # fmt: skip


@dataclass
class FakeKernel:
    """A `Kernel`. `routes` maps an address to its route; all others go by the interface `default`."""

    links: tuple[Interface, ...] = (LO, ETH, WG)
    default: int | None = 3
    routes: dict[str, Route | None] = field(default_factory=dict)
    gateways: set[int] = field(default_factory=lambda: {2})
    broken: bool = False

    def interfaces(self) -> tuple[Interface, ...]:
        if self.broken:
            raise OSError(1, "not permitted")
        return self.links

    def changed(self) -> None:
        """Every look is a fresh one."""

    def fib(self) -> Fib:
        """All by the interface `default`; beneath it, for marked packets, the interfaces with a gateway."""
        if self.broken:
            raise OSError(1, "not permitted")
        main = tuple(
            RouteEntry(version=4, table=254, first=0, prefix=0, hops=(Hop(i, ip_address("192.0.2.254")),), metric=i)
            for i in sorted(self.gateways)
            if any(link.index == i for link in self.links)
        )
        if self.default is None:
            return Fib((Rule(version=4, priority=2, table=254),), ())
        over = RouteEntry(version=4, table=51820, first=0, prefix=0, hops=(Hop(self.default),))
        rules = (
            Rule(version=4, priority=1, table=51820, mark=51820, invert=True),
            Rule(version=4, priority=2, table=254),
        )
        return Fib(rules, (over, *main))

    def route(
        self,
        destination: IPAddress,
        *,
        port: int = 0,
        protocol: int = 17,
        via: int | None = None,
        match: bool = False,
        source: tuple[IPAddress, int] | None = None,
    ) -> Route | None:
        if self.broken:
            raise OSError(1, "not permitted")
        if via is not None:
            return Route(interface=via, gateway=via in self.gateways)
        if str(destination) in self.routes:
            return self.routes[str(destination)]
        return None if self.default is None else Route(interface=self.default, prefix=0)


def refuse(rule: str) -> None:
    """Have this namespace's output hook do what an nftables rule says."""
    text = f"table inet t {{\nchain out {{\ntype filter hook output priority 0\n{rule}\n}}\n}}\n"
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def surveyed(*links: Interface, tunnel: str = "wg0") -> Survey:
    """These devices with `tunnel` as the tunnel, and all others that lead out of this host beside it."""
    found = roles(links, Fib(), configured=tunnel)
    return Survey(interfaces=links, tunnel=tunnel, uplinks=found.uplinks, beside=found.beside)


class Answering(asyncio.DatagramProtocol):
    """A UDP server on the loopback that answers with what `answer` makes of a datagram; None keeps quiet."""

    def __init__(self, answer: Callable[[bytes], bytes | list[bytes] | None]) -> None:
        self.answer = answer
        self.got: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.got.append(data)
        answer = self.answer(data)
        for piece in answer if isinstance(answer, list) else [answer]:
            if piece is not None:
                self.transport.sendto(piece, addr)  # type: ignore[attr-defined]


@asynccontextmanager
async def udp(
    answer: Callable[[bytes], bytes | list[bytes] | None], host: str = "127.0.0.1"
) -> AsyncIterator[tuple[int, Answering]]:
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Answering(answer), local_addr=(host, 0)
    )
    try:
        yield transport.get_extra_info("sockname")[1], protocol
    finally:
        transport.close()


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _tracked(talk: Talk) -> tuple[Talk, set[asyncio.Task[None]]]:
    """`talk` as a server wants it, and the conversations that are going on."""
    open_: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_.add(task)
        with suppress(OSError, EOFError):
            await talk(reader, writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    return serve, open_


@asynccontextmanager
async def unix(path: Path, talk: Talk) -> AsyncIterator[None]:
    """A server on a UNIX socket; at the end every one of its connections is over too."""
    serve, open_ = _tracked(talk)
    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()
        await asyncio.gather(*open_)
        await server.wait_closed()


@asynccontextmanager
async def tcp(talk: Talk) -> AsyncIterator[int]:
    """A TCP server; at the end every one of its connections is over too."""
    serve, open_ = _tracked(talk)
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.gather(*open_)
        await server.wait_closed()


@asynccontextmanager
async def http(respond: Callable[[str], bytes]) -> AsyncIterator[tuple[int, list[str]]]:
    """An HTTP server; `respond` gets the request's head and body and returns the raw answer."""
    got: list[str] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(line.split(":")[1]) for line in head.lower().splitlines() if "content-length" in line), 0)
        got.append(head + (await reader.readexactly(length)).decode())
        writer.write(respond(got[-1]))
        await writer.drain()

    async with tcp(talk) as port:
        yield port, got


def reply(body: bytes | str, status: int = 200, **headers: str) -> bytes:
    raw = body.encode() if isinstance(body, str) else body
    fields = {"Content-Length": str(len(raw)), **{k.replace("_", "-"): v for k, v in headers.items()}}
    return (
        f"HTTP/1.1 {status} X\r\n".encode()
        + "".join(f"{k}: {v}\r\n" for k, v in fields.items()).encode()
        + b"\r\n"
        + raw
    )


@dataclass(frozen=True)
class Loopback:
    """A `Target` on the loopback whose question and answer are plain text: `where?` and an address."""

    name: str
    port: int
    address: IPAddress = field(default_factory=lambda: ip_address("127.0.0.1"))

    def question(self) -> tuple[bytes, Callable[[bytes], EchoAnswer | None]]:
        return b"where?", self._read

    @staticmethod
    def _read(data: bytes) -> EchoAnswer | None:
        if data == b"none":
            return EchoAnswer(None)
        try:
            return EchoAnswer(ip_address(data.decode()))
        except ValueError:
            return None


class _Skipping(selectors.DefaultSelector):
    """Where no socket is ready, time jumps to when something is due."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0 if timeout is None or timeout > 0 else timeout)
        if not ready and timeout is None:
            return super().select(None)
        if not ready:
            self.now += timeout or 0.0
        return ready


def waited(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """Run `work` on time that passes only while it waits for something that does not come; how many seconds that was.

    On the loopback what is sent is there at once, so that answers take no time. Threads are not waited for.
    """
    selector = _Skipping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(work), selector.now
