"""The three canaries (docs/reference/situations.md): C1 on the default route, C2 beside the tunnel, C3 for one hop.

All are sent in parallel. An IP version is settled when one of its targets answered; those that are still out are then
omitted and not counted as lost. When no target of a version answers, a reserve is asked too, so that one target that
refuses VPN exits (situation 35) never looks like a dead tunnel.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Set
from dataclasses import dataclass, replace
from typing import Any, Final

from vpn_sentinel.agent.net.interfaces import Paths
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.agent.probes.datagram import DatagramResult, DatagramTarget, ask
from vpn_sentinel.agent.probes.targets import CLOUDFLARE, NO_DNS, OPENDNS, EchoAnswer, Target
from vpn_sentinel.agent.probes.tcp import opens
from vpn_sentinel.domain.observation import ASKED_BY_DNS, Answer, Canary, Path, Probe
from vpn_sentinel.domain.policy import IPAddress

SETTLE_S: Final = 0.3  # for slower targets once one has answered; then the reserve is asked where none has
LEAK_SETTLE_S: Final = 0.1  # for the others once a leak is certain: where both IP versions leak, both are reported
_C1: Final = frozenset({Probe.DEFAULT})
MAX_UPLINKS: Final = 4  # uplinks beside the tunnel that are probed in one round
# Asks a target over TCP.
TcpQuestion = Callable[[], Coroutine[Any, Any, Canary]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OverTcp:
    """A target that is asked over TCP by `ask`, such as the HTTPS trace; `path` is that to `port` of `address`.

    `address` is None for one that is known by its name only.
    """

    ask: TcpQuestion
    address: IPAddress | None
    port: int
    path: Path = Path.UNKNOWN
    family: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryPlan:
    """Which targets to ask: `targets` and `also` always, `reserve` and `others` when an IP version has no address yet.

    `no_dns` is asked beside the tunnel where only DNS targets show the address there: see `_believed`.
    `gateway` is the tunnel's other end, asked when no target has answered. `marked`: a rule routes some mark past the
    tunnel, so connections may take another path than datagrams; then they are tested too. `suspects` are targets by
    name and family whose answer is awaited although others have answered. Addresses that `may_leave` prove no leak.
    """

    targets: tuple[Target, ...] = CLOUDFLARE
    also: tuple[TcpQuestion, ...] = ()
    reserve: tuple[Target, ...] = OPENDNS
    others: tuple[OverTcp, ...] = ()
    no_dns: Target = NO_DNS
    gateway: Target | None = None
    marked: bool = False
    suspects: Set[tuple[str, int]] = frozenset()
    may_leave: Callable[[IPAddress], bool] = lambda _: False


async def one(
    target: Target,
    path: Path,
    probe: Probe = Probe.DEFAULT,
    device: str | None = None,
    paths: Paths | None = None,
) -> Canary:
    """Send one canary and wait for its result, one second at most. With `paths` its path is looked up again then."""
    payload, read = target.question()
    hops = 1 if probe is Probe.FIRST_HOP else None
    destination = DatagramTarget(address=target.address, port=target.port, device=device, hops=hops)
    outcome = await ask(destination, payload, read)
    if outcome.local is not None and paths is not None:
        now = paths.of(target.address, target.port, source=outcome.local)
        # A multipath route depends on the socket; if another one changed meanwhile, the path that was taken is unknown.
        path = now if paths.is_balanced(target.address) or now is path else Path.UNKNOWN
    return as_canary(outcome, target, path, probe, device)


def as_canary(
    outcome: DatagramResult[EchoAnswer], target: Target, path: Path, probe: Probe, device: str | None = None
) -> Canary:
    """The outcome as a canary. The address of C3 is the router that reported the exceeded TTL."""
    address = outcome.value.address if outcome.value else None
    answer = outcome.answer
    if probe is Probe.GATEWAY and answer is Answer.UNREACHABLE and outcome.router == target.address:
        answer = Answer.ANSWERED  # "port unreachable" by the host itself
    if probe is Probe.FIRST_HOP:
        address = outcome.router if answer is Answer.EXPIRED else None
    return Canary(
        probe=probe,
        target=target.name,
        family=target.address.version,
        answer=answer,
        path=path,
        address=address,
        rtt_ms=None if outcome.rtt_ms is None else round(outcome.rtt_ms, 1),
        interface=device if probe in (Probe.PHYSICAL, Probe.FIRST_HOP) else None,
    )


@dataclass(frozen=True, slots=True)
class _SentCanary:
    """`leads`: there is a route. Without one, only a refusal by this host is a result."""

    probe: Probe
    family: int
    path: Path
    awaited: bool = False
    uplink: Interface | None = None
    target: Target | None = None
    leads: bool = True

    @property
    def is_default(self) -> bool:
        return self.probe is Probe.DEFAULT

    @property
    def question(self) -> tuple[Probe, int, str | None]:
        return self.probe, self.family, self.uplink.name if self.uplink else None


class _Asked:
    """The canaries that were sent, and their results."""

    def __init__(self, group: asyncio.TaskGroup, paths: Paths, plan: CanaryPlan) -> None:
        self._suspects = plan.suspects
        self._may_leave = plan.may_leave
        self._group = group
        self._paths = paths
        self._sent: dict[asyncio.Task[Canary], _SentCanary] = {}
        self._witnesses: list[asyncio.Task[Canary]] = []

    def send(self, targets: Iterable[Target]) -> None:
        """C1: by the kernel's routes."""
        for target in targets:
            path = self._paths.of(target.address, target.port)
            if path is Path.OUTSIDE and (self._may_leave(target.address) or _is_meant_to(target, self._paths)):
                continue
            task = self._group.create_task(one(target, path, paths=self._paths))
            family = target.address.version
            awaited = path is Path.OUTSIDE or (target.name, family) in self._suspects
            self._sent[task] = _SentCanary(Probe.DEFAULT, family, path, awaited)

    def send_beside(self, targets: Iterable[Target], probe: Probe, uplink: Interface) -> None:
        """C2 and C3: bound to one of the uplinks beside the tunnel."""
        for target in targets:
            leads = self._paths.can_route(uplink, target.address)
            task = self._group.create_task(one(target, Path.OUTSIDE, probe, uplink.name))
            family = target.address.version
            self._sent[task] = _SentCanary(probe, family, Path.OUTSIDE, uplink=uplink, target=target, leads=leads)

    def send_gateway(self, gateway: Target, device: str | None) -> None:
        task = self._group.create_task(one(gateway, Path.TUNNEL, Probe.GATEWAY, device))
        self._sent[task] = _SentCanary(Probe.GATEWAY, gateway.address.version, Path.TUNNEL)

    def send_also(self, others: Iterable[TcpQuestion]) -> None:
        """Targets of `also`: their answers are always awaited."""
        for other in others:
            self._sent[self._group.create_task(other())] = _SentCanary(Probe.DEFAULT, 4, Path.UNKNOWN, awaited=True)

    def send_over_tcp(self, other: OverTcp, *, hasty: bool = False, witness: bool = False) -> None:
        """`hasty`: only if a connection is accepted at once. A `witness` is awaited."""
        task = self._group.create_task(_if_it_opens(other) if hasty else other.ask())
        self._sent[task] = _SentCanary(Probe.DEFAULT, other.family, other.path, awaited=witness)
        if witness:
            self._witnesses.append(task)

    def send_more(self, plan: CanaryPlan, asked: Iterable[OverTcp]) -> None:
        """To IP versions without an answer: the reserve, and targets over TCP that were not `asked` already."""
        silent, already = self.silent(), tuple(asked)
        self.send(t for t in plan.reserve if t.address.version in silent)
        for other in plan.others:
            if other.family in silent and other not in already:
                # What blocks datagrams mostly blocks connections too, without an error. IPv6 mostly is absent.
                self.send_over_tcp(other, hasty=other.family == 6 or self.refused(other.family))

    def differ(self, other: OverTcp) -> bool:
        """Whether datagrams go beside the tunnel where a connection to the same family goes through it."""
        if other.path is not Path.TUNNEL:
            return False
        return any(s.path is Path.OUTSIDE for s in self._sent.values() if s.family == other.family and s.is_default)

    def witnesses_done(self) -> bool:
        return all(task.done() for task in self._witnesses)

    async def wait(self, seconds: float | None = None, *, until: str, of: Set[Probe] = frozenset(Probe)) -> None:
        if waiting := [t for t, s in self._sent.items() if not t.done() and s.leads and s.probe in of]:
            await asyncio.wait(waiting, timeout=seconds, return_when=until)

    def back(self) -> tuple[Canary, ...]:
        """The results so far; of cancelled canaries, those that could not be answered."""
        return _believed([c for t, s in self._sent.items() if t.done() and (c := _result(t, s)) is not None])

    def silent(self) -> set[int]:
        """The IP versions for which no C1 has shown an address."""
        return {4, 6} - {c.family for c in self.back() if c.probe is Probe.DEFAULT and c.address is not None}

    def nothing_answered(self) -> bool:
        """Whether no C1 has been answered, although this host sent some."""
        found = {c.answer for c in self.back() if c.probe is Probe.DEFAULT}
        return Answer.ANSWERED not in found and found != {Answer.BLOCKED}

    def refused(self, family: int) -> bool:
        """Whether this host itself refused to send every C1 of `family`: a kill switch."""
        answers = {c.answer for c in self.back() if c.probe is Probe.DEFAULT and c.family == family}
        return answers == {Answer.BLOCKED}

    def settled(self) -> bool:
        """Whether the remaining ones can be omitted: for their kind and IP version there is an answer.

        A C1 that the kernel routes outside is always awaited: its answer would be a leak, also when it is slow.
        """
        answered = {
            (c.probe, c.family, c.interface)
            for c in self.back()
            if c.address is not None or (c.probe is not Probe.DEFAULT and c.answer in (Answer.ANSWERED, Answer.EXPIRED))
        }
        return all(t.done() or not s.leads or (s.question in answered and not s.awaited) for t, s in self._sent.items())

    def stop(self) -> None:
        for task in self._sent:
            task.cancel()


def _believed(found: list[Canary]) -> tuple[Canary, ...]:
    """Without the addresses in answers that may not be from the nameserver: a home router may divert port 53.

    An answer from an address without a DNS server shows it. A server's echo has another port, and is believed.
    """
    diverted = {c.interface for c in found if c.target == NO_DNS.name and c.answer is Answer.ANSWERED}
    return tuple(
        replace(c, address=None) if c.interface in diverted and c.target in ASKED_BY_DNS else c
        for c in found
        if c.target != NO_DNS.name
    )


def _result(task: asyncio.Task[Canary], sent: _SentCanary) -> Canary | None:
    """Without a route by an uplink, no target could be reached by it, so silence is no result."""
    canary = None if task.cancelled() else task.result()
    if sent.leads or sent.uplink is None or sent.target is None:
        return canary
    if canary is None:
        return as_canary(DatagramResult(Answer.UNKNOWN), sent.target, sent.path, sent.probe, sent.uplink.name)
    silent = canary.answer in (Answer.LOST, Answer.UNREACHABLE)
    return replace(canary, answer=Answer.UNKNOWN) if silent else canary


async def canaries(
    plan: CanaryPlan,
    paths: Paths,
    *,
    enough: Callable[[tuple[Canary, ...]], bool] = lambda _: False,
    silence: Callable[[tuple[Canary, ...]], None] = lambda _: None,
) -> tuple[Canary, ...]:
    """Send them all and wait about 1.3 s at most, or as long as the slowest of `plan.others`.

    `enough` is called once each C1 is done or 0.3 s have passed, with the results so far; when it is true, the others
    get 0.1 s more. `silence` is called with the results after 0.3 s when no C1 has been answered.
    """
    uplinks = paths.survey.uplinks[:MAX_UPLINKS] if paths.survey.tunnel else ()
    async with asyncio.TaskGroup() as group:
        asked = _Asked(group, paths, plan)
        asked.send(plan.targets)
        for uplink in uplinks:
            asked.send_beside(plan.targets, Probe.PHYSICAL, uplink)
            if plan.targets and all(t.name in ASKED_BY_DNS for t in plan.targets):
                asked.send_beside((plan.no_dns,), Probe.PHYSICAL, uplink)
            asked.send_beside(CLOUDFLARE, Probe.FIRST_HOP, uplink)
        # A rule for UDP, or for the port of DNS, routes most canaries elsewhere than the rest of the traffic; a
        # firewall may mark connections, which the routes do not show.
        doubtful = [o for o in plan.others if plan.marked and o.family == 4 and o.path is Path.TUNNEL]
        witnesses = [o for o in plan.others if o in doubtful or asked.differ(o)]
        for other in witnesses:
            asked.send_over_tcp(other, witness=True)
        asked.send_also(plan.also)
        started = asyncio.get_running_loop().time()
        await asked.wait(SETTLE_S, until=asyncio.ALL_COMPLETED, of=_C1)
        if not (enough(asked.back()) and asked.witnesses_done()):
            await asked.wait(started + SETTLE_S - asyncio.get_running_loop().time(), until=asyncio.ALL_COMPLETED)
            if asked.nothing_answered():
                if plan.gateway is not None:
                    asked.send_gateway(plan.gateway, paths.survey.tunnel)
                silence(asked.back())
            asked.send_more(plan, witnesses)
            while not asked.settled() and not (enough(asked.back()) and asked.witnesses_done()):
                await asked.wait(until=asyncio.FIRST_COMPLETED)
        if enough(asked.back()):
            await asked.wait(LEAK_SETTLE_S, until=asyncio.ALL_COMPLETED)
        asked.stop()
    return asked.back()


async def _if_it_opens(other: OverTcp) -> Canary:
    if other.address is not None and await opens(other.address, other.port):
        return await other.ask()
    return Canary(probe=Probe.DEFAULT, target="trace", family=other.family, answer=Answer.UNKNOWN, path=other.path)


def _is_meant_to(target: Target, paths: Paths) -> bool:
    """The server may run on the host of the VPN server, to which a VPN client adds a route beside the tunnel."""
    return target.name == "echo" and paths.has_host_route(target.address, target.port)
