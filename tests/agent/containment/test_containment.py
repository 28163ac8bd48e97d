"""When the ways out are closed and opened: with a kernel that is a dictionary, and a clock that is told the time."""

from dataclasses import dataclass, field, replace
from ipaddress import ip_address

from tests.agent.containment.test_proof import POLICY, WELL, canary
from tests.conftest import ManualClock
from vpn_sentinel.agent.containment.containment import Containment, ContainmentDeps, Mode, owner_mark
from vpn_sentinel.agent.containment.nft import NftError
from vpn_sentinel.agent.containment.proof import Cause, to_text
from vpn_sentinel.agent.containment.rules import RELEASED_TABLE, TABLE, AllowedTraffic
from vpn_sentinel.agent.net.endpoints import Endpoint
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import Answer, Observation, Outcome, Path, Trigger

CAUSE = Cause(families=frozenset({4}))
NOBODY = Observation(trigger=Trigger.TIMER)


@dataclass
class Kept:
    identity: str = "5af0"
    facts: dict[str, str] = field(default_factory=dict)

    def fact(self, name: str) -> str | None:
        return self.facts.get(name)

    def keep(self, name: str, value: str) -> None:
        self.facts[name] = value


@dataclass
class World:
    """The kernel's tables by name, with the owner's mark each, and what was told."""

    tables: dict[str, str] = field(default_factory=dict)
    told: list[tuple[str, Outcome, str]] = field(default_factory=list)
    clock: ManualClock = field(default_factory=ManualClock)
    allowed: AllowedTraffic | None = field(default_factory=lambda: AllowedTraffic(tunnel="wg0"))
    kept: Kept = field(default_factory=Kept)
    seat: bool = True
    broken: OSError | None = None
    written: int = 0

    async def nft(self, commands: str) -> None:
        if self.broken:
            raise self.broken
        for name in (TABLE, RELEASED_TABLE):
            if f"delete table inet {name}\n" in commands:
                self.tables.pop(name, None)
        if f"table inet {TABLE} {{" in commands:
            self.tables[TABLE] = commands.split('comment "')[1].split('"')[0]
            self.written += 1

    def owner_of(self, table: str) -> str | None:
        if self.broken:
            raise self.broken
        return self.tables.get(table)

    def made(self, mode: Mode = Mode.ON) -> Containment:
        ground = ContainmentDeps(
            allowed=lambda _cause: self.allowed,
            path_of=lambda *_: Path.TUNNEL,
            nft=self.nft,
            owner_of=self.owner_of,
            take_lock=lambda: self.seat,
            on_action=lambda name, outcome, detail: self.told.append((name, outcome, detail)),
        )
        return Containment(mode, "anna", self.kept, ground, self.clock)

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        return [(name, str(outcome)) for name, outcome, _ in self.told]


async def well(containment: Containment, world: World, rounds: int, step: float = 2.0) -> None:
    for _ in range(rounds):
        world.clock.now += step
        await containment.saw(WELL, judge(WELL, POLICY))


async def test_a_leak_closes_and_a_proven_tunnel_opens() -> None:
    world = World()
    containment = world.made()
    await containment.start()
    await containment.leaking(CAUSE)
    assert containment.contained
    assert world.tables == {TABLE: owner_mark("anna", "5af0")}
    await well(containment, world, 2)  # two rounds, 2 s from one to the other: not long enough
    assert containment.contained
    await well(containment, world, 1)
    assert not containment.contained
    assert world.tables == {}
    assert world.outcomes == [("contain", "done"), ("release", "done")]


async def test_unknown_proves_nothing_and_starts_the_proof_anew() -> None:
    world = World()
    containment = world.made()
    await containment.leaking(CAUSE)
    await well(containment, world, 2)
    await containment.saw(NOBODY, judge(NOBODY, POLICY))
    await well(containment, world, 2)
    assert containment.contained
    await well(containment, world, 1)
    assert not containment.contained


async def test_a_leak_that_comes_back_needs_a_longer_proof() -> None:
    world = World()
    containment = world.made()
    await containment.leaking(CAUSE)
    await well(containment, world, 3)
    await containment.leaking(CAUSE)
    await well(containment, world, 20)
    assert containment.contained, "40 s are not the minute that a relapse takes"
    await well(containment, world, 11)
    assert not containment.contained


async def test_off_and_dry_run_touch_nothing() -> None:
    for mode, told in ((Mode.OFF, []), (Mode.DRY_RUN, [("contain", "dry_run")])):
        world = World()
        containment = world.made(mode)
        await containment.start()
        await containment.leaking(CAUSE)
        await containment.leaking(CAUSE)
        assert not containment.contained
        assert world.tables == {}
        assert world.outcomes == told, "a dry run is told once for one leak"


async def test_rules_of_before_a_restart_are_adopted_with_their_cause() -> None:
    world = World(tables={TABLE: owner_mark("anna", "another-spool")})
    world.kept.keep("containment.cause", to_text(Cause(families=frozenset({6}))))
    containment = world.made()
    await containment.start()
    assert containment.contained
    still = replace(WELL, canaries=(*WELL.canaries, canary(Answer.BLOCKED, Path.OUTSIDE, family=6)))
    for _ in range(5):
        world.clock.now += 2
        await containment.saw(still, judge(still, POLICY))
    assert containment.contained, "IPv6 leaked before the restart and is still routed outside"
    await well(containment, world, 3)
    assert world.tables == {}


async def test_killed_as_the_rules_come_up_their_cause_is_known() -> None:
    """Adopted without it, they would be opened though what leaked is still routed outside."""
    world = World()
    known_then: list[str | None] = []

    async def nft(commands: str) -> None:
        known_then.append(world.kept.fact("containment.cause"))
        raise NftError("killed")

    world.nft = nft  # type: ignore[method-assign]
    await world.made().leaking(CAUSE)
    assert known_then == [to_text(CAUSE)]


async def test_a_cause_that_grows_is_known_after_a_restart() -> None:
    world = World()
    containment = world.made()
    await containment.leaking(CAUSE)
    both = Cause(families=frozenset({4, 6}))
    await containment.leaking(Cause(families=frozenset({6})))
    assert world.kept.fact("containment.cause") == to_text(both)


async def test_leftovers_go_when_containment_is_switched_off() -> None:
    world = World(tables={TABLE: owner_mark("anna", "5af0")})
    await world.made(Mode.OFF).start()
    assert world.tables == {}


async def test_rules_of_another_agent_are_never_touched() -> None:
    for mode in Mode:
        world = World(tables={TABLE: owner_mark("ben", "5af0")})
        containment = world.made(mode)
        await containment.start()
        await containment.leaking(CAUSE)
        await containment.leaking(CAUSE)
        await well(containment, world, 3)
        assert world.tables == {TABLE: owner_mark("ben", "5af0")}
        assert not containment.contained
    world = World(seat=False)
    await world.made().leaking(CAUSE)
    assert world.tables == {}
    assert world.told[0][1:] == (Outcome.FAILED, "another agent holds containment in this namespace")


async def test_a_release_by_hand_holds_until_the_next_leak() -> None:
    world = World()
    containment = world.made()
    await containment.leaking(CAUSE)
    world.tables = {RELEASED_TABLE: owner_mark("anna", "5af0")}
    await containment.leaking(CAUSE)  # it still leaks: its owner wants it open
    await containment.leaking(CAUSE)
    assert world.tables == {}
    assert not containment.contained
    assert world.told[-1] == ("release", Outcome.DONE, "by hand")
    await well(containment, world, 1)
    await containment.leaking(CAUSE)
    assert containment.contained


async def test_rules_that_somebody_flushed_are_put_back() -> None:
    world = World()
    containment = world.made()
    await containment.leaking(CAUSE)
    world.tables.clear()
    await containment.saw(NOBODY, judge(NOBODY, POLICY))
    assert world.tables == {TABLE: owner_mark("anna", "5af0")}
    assert "put back" in world.told[-1][2]


async def test_rules_follow_a_tunnel_that_moves_and_are_left_alone_else() -> None:
    world = World()
    containment = world.made()
    await containment.leaking(CAUSE)
    await containment.saw(NOBODY, judge(NOBODY, POLICY))
    assert world.written == 1
    world.allowed = AllowedTraffic(tunnel="wg0", endpoints=(Endpoint(ip_address("185.65.134.3"), 51820),))
    await containment.saw(NOBODY, judge(NOBODY, POLICY))
    assert world.written == 2


async def test_what_is_missing_is_said_once_for_one_leak() -> None:
    world = World(broken=PermissionError(1, "Operation not permitted"))
    containment = world.made()
    await containment.start()
    for _ in range(3):
        await containment.leaking(CAUSE)
    assert world.outcomes == [("contain", "failed")]
    assert "CAP_NET_ADMIN" in world.told[0][2]
    await well(containment, world, 1)
    world.broken = NftError("neither libnftables nor nft")
    await containment.leaking(CAUSE)
    assert world.told[-1] == ("contain", Outcome.FAILED, "neither libnftables nor nft")


async def test_without_a_known_tunnel_nothing_is_closed() -> None:
    world = World(allowed=None)
    containment = world.made()
    await containment.leaking(CAUSE)
    assert world.tables == {}
    assert "no tunnel interface" in world.told[0][2]


async def test_rules_that_cannot_be_removed_stay_and_are_tried_again() -> None:
    world = World()
    containment = world.made()
    await containment.leaking(CAUSE)
    await well(containment, world, 2)
    world.broken = NftError("busy")
    await well(containment, world, 1)
    assert containment.contained
    world.broken = None
    await well(containment, world, 1)
    assert not containment.contained
