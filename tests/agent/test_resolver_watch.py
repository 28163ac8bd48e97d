"""Between rounds: a resolv.conf that changes, and a nameserver that asks from elsewhere."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path

from tests.agent.doubles import udp
from tests.agent.test_dnswire import answer, text
from tests.conftest import until
from vpn_sentinel.agent.probes.dns import CanaryZone, Nameserver
from vpn_sentinel.agent.sensors.resolver import ResolverWatch, UnexpectedEgresses, mark
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import Answer, Canary, Observation, Probe, ResolverSighting, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import Code
from vpn_sentinel.wire import canary

HERE = ip_address("127.0.0.1")
NAMESERVER = ip_address("10.64.0.1")
ZONE = CanaryZone("canary.example.org", b"identity", bytes(32))
POLICY = Policy(home_networks=(ip_network("192.0.2.0/24"),))
EXIT = Canary(probe=Probe.DEFAULT, target="echo", family=4, answer=Answer.ANSWERED, address=ip_address("198.51.100.7"))


def sighting(egress: str | None, nameserver: str = str(NAMESERVER)) -> ResolverSighting:
    return ResolverSighting(
        method="canary",
        nameserver=ip_address(nameserver),
        answer=Answer.ANSWERED,
        egress=ip_address(egress) if egress else None,
    )


def strays(*egresses: str) -> UnexpectedEgresses:
    made = UnexpectedEgresses()
    saw(made, *egresses)
    return made


def saw(made: UnexpectedEgresses, *egresses: str) -> None:
    seen = Observation(trigger=Trigger.TIMER, canaries=(EXIT,), resolvers=tuple(sighting(e) for e in egresses))
    made.saw(seen, judge(seen, POLICY), POLICY)


def test_an_egress_at_home_is_news() -> None:
    assert strays("198.51.100.53").is_news(sighting("192.0.2.53"))


def test_so_is_one_that_nothing_explains() -> None:
    assert strays("198.51.100.53").is_news(sighting("203.0.113.53"))


def test_the_exits_network_known_resolvers_and_what_a_round_saw_are_none() -> None:
    made = strays("198.51.100.53", "203.0.113.53")
    for egress in ("198.51.100.99", "172.70.240.53", "203.0.113.53", None):
        assert not made.is_news(sighting(egress)), egress


def test_before_any_round_nothing_is_news() -> None:
    assert not UnexpectedEgresses().is_news(sighting("192.0.2.53"))


def test_what_was_no_leak_stays_none_and_a_leak_that_comes_back_is_news() -> None:
    made = strays("203.0.113.53")
    saw(made, "198.51.100.53")
    assert not made.is_news(sighting("203.0.113.53"))
    saw(made, "192.0.2.53")
    assert not made.is_news(sighting("192.0.2.53"))  # it is told already
    saw(made, "198.51.100.53")
    assert made.is_news(sighting("192.0.2.53"))


def test_what_is_remembered_is_bounded() -> None:
    made = UnexpectedEgresses()
    for i in range(400):
        saw(made, f"203.0.{113 + i // 250}.{i % 250}")
    assert len(made._fine) == 256


@asynccontextmanager
async def watching(
    file: Path, port: int = 1, zone: Callable[[], CanaryZone | None] = lambda: None
) -> AsyncIterator[asyncio.Queue[str]]:
    rang: asyncio.Queue[str] = asyncio.Queue()
    watch = ResolverWatch(
        canary=zone,
        changed=lambda: rang.put_nowait("changed"),
        unexpected_egress=lambda: rang.put_nowait("unexpected_egress"),
        file=file,
        nameservers=lambda: (Nameserver(HERE, port=port),),
        file_every=0.01,
        canary_every=0.02,
    )
    seen = Observation(
        trigger=Trigger.TIMER, canaries=(EXIT,), resolvers=(sighting("198.51.100.53", nameserver=str(HERE)),)
    )
    verdict = judge(seen, POLICY)
    assert Code.DNS_LEAK not in {f.code for f in verdict.findings}
    watch.saw(seen, verdict, POLICY)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(watch.run())
        yield rang
        running.cancel()


async def heard(rang: asyncio.Queue[str]) -> str:
    async with asyncio.timeout(5):
        return await rang.get()


async def test_a_file_that_is_written_replaced_or_removed_rings(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 10.64.0.1\n")
    async with watching(file) as rang:
        file.write_text("nameserver 10.64.0.1\nnameserver 192.0.2.53\n")
        assert await heard(rang) == "changed"
        other = tmp_path / "other"
        other.write_text("nameserver 10.64.0.2\n")
        other.rename(file)
        assert await heard(rang) == "changed"
        file.unlink()
        assert await heard(rang) == "changed"
    assert mark(file) is None


async def test_a_file_that_a_round_has_read_since_is_no_news(tmp_path: Path) -> None:
    """A client changes routes and this file together: the round that the routes began reads both."""
    file = tmp_path / "resolv.conf"
    rang: list[str] = []
    watch = ResolverWatch(
        canary=lambda: None,
        changed=lambda: rang.append(file.read_text()),
        unexpected_egress=lambda: None,
        file=file,
        nameservers=tuple,
        file_every=0.01,
        canary_every=1.0,
    )
    running = asyncio.get_running_loop().create_task(watch.run())
    file.write_text("nameserver 10.64.0.1\n")
    watch.round_begins()
    await asyncio.sleep(0.05)
    assert rang == []
    file.write_text("nameserver 192.168.1.1\n")
    await until(lambda: rang)
    running.cancel()
    assert rang == ["nameserver 192.168.1.1\n"]


async def test_a_nameserver_that_strays_rings(tmp_path: Path) -> None:
    egress, got, thrice = ["198.51.100.53"], [], asyncio.Event()

    def resolver(asked: bytes) -> bytes:
        got.append(asked[12:])
        if len(got) == 3:
            thrice.set()
        nonce = bytes.fromhex(asked[13 : 13 + canary.LABEL_LENGTH].decode())[
            canary.ID_BYTES : canary.ID_BYTES + canary.NONCE_BYTES
        ]
        said = canary.answer(ip_address(egress[0]), nonce, ZONE.key)
        return answer(asked, text(*(s.encode() for s in said)))

    async with udp(resolver) as (port, _), watching(tmp_path / "none", port, lambda: ZONE) as rang:
        async with asyncio.timeout(5):
            await thrice.wait()
        assert rang.empty()
        egress[0] = "192.0.2.53"
        assert await heard(rang) == "unexpected_egress"
    assert len(set(got)) == len(got)  # never the same name twice


async def test_without_a_zone_nobody_is_asked(tmp_path: Path) -> None:
    got: list[bytes] = []
    turns: list[None] = []
    async with udp(got.append) as (port, _), watching(tmp_path / "none", port, lambda: turns.append(None)) as rang:
        await until(lambda: len(turns) > 3)
        assert rang.empty()
    assert got == []
