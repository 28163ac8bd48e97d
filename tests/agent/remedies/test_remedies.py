"""Remedies as they run: what is done, counted, told and remembered."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from tests.agent.containment.test_containment import Kept
from tests.agent.containment.test_proof import WELL
from tests.conftest import ManualClock
from vpn_sentinel.agent.remedies.failure import RemedyError
from vpn_sentinel.agent.remedies.plan import RemedyRules
from vpn_sentinel.agent.remedies.remedies import Remedies
from vpn_sentinel.domain.observation import Outcome
from vpn_sentinel.domain.verdict import Code, Finding, State, Verdict

LEAKING = Verdict(State.LEAKING, (Finding(Code.IP_LEAK, "out", {"address": "91.10.10.20"}),))
DOWN = Verdict(State.DOWN, (Finding(Code.NO_TRAFFIC, "dead"),))
FINE = Verdict(State.PROTECTED)


@dataclass
class Client:
    name: str = "qbittorrent"
    running: tuple[str, ...] = ("a", "b")
    resumed: list[tuple[str, ...]] = field(default_factory=list)
    trouble: str = ""

    async def pause(self) -> tuple[str, ...]:
        if self.trouble:
            raise RemedyError(self.trouble)
        return self.running

    async def resume(self, hashes: tuple[str, ...]) -> None:
        self.resumed.append(hashes)


@dataclass
class World:
    clock: ManualClock = field(default_factory=ManualClock)
    kept: Kept = field(default_factory=Kept)
    last_notified: list[tuple[str, Outcome, str]] = field(default_factory=list)
    documents: list[dict[str, object]] = field(default_factory=list)
    restarts: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def hook(self, document: bytes) -> str:
        self.documents.append(json.loads(document))
        return "ended well"

    async def restart(self) -> str:
        self.restarts += 1
        return "restarted"

    def on_action(self, name: str, outcome: Outcome, detail: str) -> None:
        self.last_notified.append((name, outcome, detail))
        self.news.set()

    def made(self, wants: RemedyRules, *clients: Client, dry_run: bool = False) -> Remedies:
        return Remedies(
            wants,
            self.kept,
            self.clock,
            self.on_action,
            client_id="anna",
            hook=self.hook,
            restart=self.restart,
            clients=clients,
            dry_run=dry_run,
        )

    async def heard(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.last_notified) < count:
                self.news.clear()
                await self.news.wait()


@asynccontextmanager
async def running(remedies: Remedies) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(remedies.run())
        yield
        task.cancel()


async def test_a_command_gets_the_verdict_as_json() -> None:
    world = World()
    remedies = world.made(RemedyRules(hook=True))
    async with running(remedies):
        remedies.saw(WELL, FINE)
        remedies.saw(WELL, LEAKING)
        await world.heard(1)
    (document,) = world.documents
    assert world.last_notified == [("hook", Outcome.DONE, "ended well")]
    assert document["client_id"] == "anna"
    assert (document["previous"], document["state"]) == ("protected", "leaking")
    assert document["exit"] == {"ipv4": "185.65.134.10", "ipv6": None}
    assert document["tunnel"] == {"interface": "wg0", "present": True, "up": True}
    assert document["findings"] == [
        {"code": "ip_leak", "severity": "critical", "message": "out", "evidence": {"address": "91.10.10.20"}}
    ]


async def test_torrents_that_ran_are_resumed_by_the_agent_that_starts_next() -> None:
    world, client = World(), Client()
    wants = RemedyRules(clients=("qbittorrent",), resume=True)
    remedies = world.made(wants, client)
    async with running(remedies):
        remedies.saw(WELL, LEAKING)
        await world.heard(1)
    client.running = ()
    remedies = world.made(wants, client)
    async with running(remedies):
        remedies.saw(WELL, FINE)
        await world.heard(2)
    assert client.resumed == [("a", "b")]
    assert [name for name, _, _ in world.last_notified] == ["qbittorrent_pause", "qbittorrent_resume"]


async def test_a_failure_is_told_and_tried_again_later() -> None:
    world, client = World(), Client(trouble="refuses")
    remedies = world.made(RemedyRules(clients=("qbittorrent",)), client)
    async with running(remedies):
        remedies.saw(WELL, LEAKING)
        await world.heard(1)
        remedies.saw(WELL, LEAKING)
        await world.heard(2)
        client.trouble = ""
        world.clock.now += 61
        remedies.saw(WELL, LEAKING)
        await world.heard(3)
    assert [outcome for _, outcome, _ in world.last_notified] == [Outcome.FAILED, Outcome.HELD, Outcome.DONE]


async def test_a_dry_run_does_nothing_and_says_so() -> None:
    world, client = World(), Client(trouble="must not be asked")
    remedies = world.made(RemedyRules(hook=True, clients=("qbittorrent",)), client, dry_run=True)
    async with running(remedies):
        remedies.saw(WELL, LEAKING)
        await world.heard(2)
    assert {outcome for _, outcome, _ in world.last_notified} == {Outcome.DRY_RUN}
    assert world.documents == []


async def test_one_that_hangs_holds_up_no_other_and_is_not_started_twice() -> None:
    world = World()
    started = asyncio.Event()

    async def hang(_: bytes) -> str:
        started.set()
        await asyncio.Event().wait()
        return ""

    remedies = Remedies(
        RemedyRules(hook=True, restart=True, restart_after=0, cap=60),
        world.kept,
        world.clock,
        world.on_action,
        client_id="anna",
        hook=hang,
        restart=world.restart,
    )
    async with running(remedies):
        remedies.saw(WELL, DOWN)
        await world.heard(1)
        await started.wait()
        world.clock.now += 120
        remedies.saw(WELL, DOWN)
        await world.heard(2)
        with suppress(TimeoutError):
            await asyncio.wait_for(world.heard(3), 0.05)
    assert [name for name, _, _ in world.last_notified] == ["gluetun_restart", "gluetun_restart"]
    assert world.restarts == 2


@pytest.mark.parametrize("by", [-3600.0, 3600.0, -3.0e8, 3.0e8])
async def test_no_more_restarts_an_hour_for_a_clock_that_is_set(by: float) -> None:
    world = World()
    remedies = world.made(RemedyRules(restart=True, restart_after=0.0, cap=3))
    async with running(remedies):
        for minute in range(59):
            world.clock.set_by = by * (minute % 2)
            remedies.saw(WELL, DOWN)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            world.clock.now += 60.0
    assert world.restarts == 3
