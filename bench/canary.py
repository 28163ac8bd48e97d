"""DNS questions a second, UDP and TCP, beside a bare uvloop UDP echo that answers what it was sent.

Server on core 0, load on core 1, in turns; 64 questions are on their way at a time. UDP questions are answered by
"come over TCP", as any agent's are; over TCP each connection asks again as soon as it was answered.
"""

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop
from prometheus_client import CollectorRegistry

from bench.dns_seeds import TXT, edns, own_name, question
from vpn_sentinel.server.dns_canary.listener import DnsCanaryMetrics, DnsListener, TcpLimits
from vpn_sentinel.server.dns_canary.query_limit import QueryLimit
from vpn_sentinel.server.dns_canary.responder import Responder
from vpn_sentinel.server.dns_canary.zone import Zone

SECRET, ZONE = bytes(range(32)), "canary.example.org"
AT_ONCE, SECONDS, ROUNDS = 64, 3.0, 3
_ENDLESS = 1e9  # the gate would end the measurement


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data, addr)  # type: ignore[attr-defined]


async def serve(kind: str) -> None:
    udp, tcp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket()
    udp.bind(("127.0.0.1", 0))
    tcp.bind(udp.getsockname())
    print(udp.getsockname()[1], flush=True)
    if kind == "echo":
        await asyncio.get_running_loop().create_datagram_endpoint(Echo, sock=udp)
    else:
        zone = Zone(name=ZONE, servers=(f"ns.{ZONE}",), addresses=tuple, secret=SECRET)
        gate = QueryLimit(genuine=_ENDLESS, other=_ENDLESS, total=_ENDLESS)
        limits = TcpLimits(connections=AT_ONCE, per_network=AT_ONCE)
        await DnsListener(Responder(zone, gate), DnsCanaryMetrics(CollectorRegistry()), limits).open([udp, tcp])
    await asyncio.Event().wait()


class UdpLoad(asyncio.DatagramProtocol):
    """Each answer is followed by the next question; a lost one would be missed, and none is on the loopback."""

    def __init__(self, asked: bytes) -> None:
        self.asked, self.answered = asked, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        for _ in range(AT_ONCE):
            transport.sendto(self.asked)  # type: ignore[attr-defined]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        del addr
        assert len(data) <= len(self.asked)
        self.answered += 1
        self.transport.sendto(self.asked)  # type: ignore[attr-defined]


class TcpLoad(asyncio.Protocol):
    def __init__(self, asked: bytes, answered: list[int]) -> None:
        self.asked, self.answered = len(asked).to_bytes(2) + asked, answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self.asked)  # type: ignore[attr-defined]

    def data_received(self, _data: bytes) -> None:
        self.answered[0] += 1
        self.transport.write(self.asked)  # type: ignore[attr-defined]


async def load(port: int, kind: str) -> float:
    loop = asyncio.get_running_loop()
    asked = question(own_name(SECRET, ZONE), TXT, opt=edns())
    start = time.perf_counter()
    if kind == "tcp":
        answered = [0]
        made = [
            (await loop.create_connection(lambda: TcpLoad(asked, answered), "127.0.0.1", port))[0]
            for _ in range(AT_ONCE)
        ]
        await asyncio.sleep(SECONDS)
        count = answered[0]
        for transport in made:
            transport.abort()
    else:
        sent, protocol = await loop.create_datagram_endpoint(lambda: UdpLoad(asked), remote_addr=("127.0.0.1", port))
        await asyncio.sleep(SECONDS)
        count = protocol.answered
        sent.close()
    return count / (time.perf_counter() - start)


def spawn(*words: str, core: int) -> subprocess.Popen[str]:
    command = ["taskset", "-c", str(core), sys.executable, "-m", "bench.canary", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def cpu(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(_words: Sequence[str] = ()) -> None:
    servers = {kind: spawn("serve", kind, core=0) for kind in ("echo", "canary")}
    ports = {kind: int(line_of(process)) for kind, process in servers.items()}
    runs = {
        "bare UDP echo": ("echo", "udp"),
        "canary over UDP": ("canary", "udp"),
        "canary over TCP": ("canary", "tcp"),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    costs: dict[str, list[float]] = {name: [] for name in runs}
    try:
        for _ in range(ROUNDS):
            for name, (server, kind) in runs.items():
                before = cpu(servers[server])
                with spawn("load", str(ports[server]), kind, core=1) as loading:
                    rates[name].append(float(line_of(loading)))
                costs[name].append(1e6 * (cpu(servers[server]) - before) / (rates[name][-1] * SECONDS))
    finally:
        for process in servers.values():
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    lines = ["| | questions/s | CPU/question |", "|---|---|---|"]
    for name in runs:
        middle, cost = statistics.median(rates[name]), statistics.median(costs[name])
        lines.append(f"| {name} | {middle:,.0f} | {cost:.0f} µs |")
    lines += ["", f"{AT_ONCE} at a time, {ROUNDS} rounds of {SECONDS:.0f} s each in turn, medians."]
    text = "\n".join(lines)
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "canary.md").write_text(text + "\n")


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if sys.argv[1] == "serve":
            runner.run(serve(sys.argv[2]))
        else:
            print(runner.run(load(int(sys.argv[2]), sys.argv[3])))
