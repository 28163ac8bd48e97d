"""One round: look once at everything, in the order in which it matters.

First the canaries. If they already show a leak or a dead tunnel, or the pulses a loss that is news, that is told at
once; only otherwise are nameservers and geolocation services asked, which takes up to some seconds.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from typing import Final, Protocol

from vpn_sentinel.agent.leakwatch.watch import LeakWatch
from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.kernel import Kernel
from vpn_sentinel.agent.net.packetsocket import packet_socket
from vpn_sentinel.agent.probes import bypass, dns, tcp
from vpn_sentinel.agent.probes.canary import MAX_UPLINKS, CanaryPlan, canaries
from vpn_sentinel.agent.probes.origin import Origins
from vpn_sentinel.agent.probes.place import Places
from vpn_sentinel.agent.probes.system_resolver import SystemResolver
from vpn_sentinel.agent.rounds.side_probes import SideProbes
from vpn_sentinel.domain.judge import judge, learned_home
from vpn_sentinel.domain.observation import (
    Answer,
    Canary,
    Link,
    Observation,
    Place,
    Probe,
    Quality,
    ResolverSighting,
    Routed,
    Trigger,
)
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy
from vpn_sentinel.domain.resolvers import undecided, unexplained, without
from vpn_sentinel.domain.unseen import rests_on_home
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.wire import limits

_PLACES_EXTRA_S: Final = 0.5  # seconds that places get beyond a DNS leak that is waiting to be told
_URGENT: Final = frozenset({State.LEAKING, State.DOWN})


class PulseView(Protocol):
    """What the pulses tell a round: see `sensors.pulse.PulseSensor`."""

    def canary(self, paths: Paths) -> Canary | None: ...

    def silent_for(self) -> float: ...

    def quality(self, link: Link | None) -> Quality | None: ...

    def works(self) -> bool | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundDeps:
    """What a round looks with. `survey` and `plan` are made anew for each round, since both change.

    `came_out` takes in where packets by the ways out beside the tunnel come out; True when that makes another survey.
    `hurry`: whether the pulses found what is to be told before nameservers and services are asked.
    """

    kernel: Kernel | None
    survey: Callable[[], Survey]
    plan: Callable[[Paths], CanaryPlan]
    places: Places
    clock: Clock
    nameservers: Callable[[], tuple[dns.Nameserver, ...]] = lambda: () if AS_USER.refused else dns.system_nameservers()
    neighbors: Callable[[], Iterable[dns.Nameserver]] = tuple
    no_dns: dns.Nameserver = dns.NO_DNS_HERE
    side_probes: SideProbes = field(default_factory=SideProbes)
    canary: Callable[[], dns.CanaryZone | None] = lambda: None
    system: SystemResolver | None = None
    origins: Origins | None = None
    pulses: PulseView | None = None
    audit: Callable[[Survey, Iterable[IPAddress]], tuple[Routed, ...] | None] = lambda _survey, _servers: None
    watch: LeakWatch | None = None
    came_out: Callable[[dict[str, frozenset[IPNetwork]]], bool] = lambda _: False
    hurry: Callable[[], bool] = lambda: False


async def look(deps: RoundDeps, trigger: Trigger, policy: Policy) -> Observation:
    """Run one round. Takes about 0.3 s when all is well, 1.3 s when the tunnel is dead, some seconds when DNS is."""
    start = deps.clock.boottime()
    survey = deps.survey()
    if deps.watch is not None:
        deps.watch.look(survey)
    paths = Paths(deps.kernel, survey)
    seen = Observation(trigger=trigger, link=survey.link(), interfaces=survey.names(), uplinks=survey.uplink_names())
    seen = replace(seen, refused_user=AS_USER.refused_uid)
    parts = _audit(deps, survey)
    silent_for = deps.pulses.silent_for() if deps.pulses is not None else 0.0

    def leaks(found: tuple[Canary, ...]) -> bool:
        return _leaks(replace(seen, canaries=found), policy)

    async with asyncio.TaskGroup() as group:
        probing = deps.side_probes.begin(group, survey)
        trying = bypass.BypassProbes(group, parts or (), survey.tunnel)
        found = await canaries(probing.with_suspects(deps.plan(paths)), paths, enough=leaks, silence=probing.silence)
        seen = await probing.add(replace(seen, canaries=found), hurry=leaks(found))
        if deps.came_out(_outside(survey, found, policy)):
            survey = deps.survey()
            if deps.watch is not None:
                deps.watch.look(survey)
            if (now := _audit(deps, survey)) != parts:
                trying.stop()
                parts, trying = now, bypass.BypassProbes(group, now or (), survey.tunnel)
        routed = await trying.results(lambda routed: _leaks(replace(seen, routed=routed), policy))
        seen = replace(seen, routed=None if parts is None else routed)
    if deps.pulses is not None:
        seen = _with_pulses(deps.pulses, seen, paths, silent_for)
    if judge(seen, policy).state not in _URGENT and not deps.hurry():
        seen = await _slow_part(deps, seen, policy, paths)
        if seen.dns_intercepted:
            seen = await _beyond_dns(deps, seen, paths)
    seen = _at_the_end(deps, seen, paths)
    return replace(seen, places=_places(deps, seen, policy), took_ms=round((deps.clock.boottime() - start) * 1000, 1))


def _audit(deps: RoundDeps, survey: Survey) -> tuple[Routed, ...] | None:
    return deps.audit(survey, () if deps.watch is None else deps.watch.judged_by_route)


def _at_the_end(deps: RoundDeps, seen: Observation, paths: Paths) -> Observation:
    """Add what is watched all the time, as it is now: the whole picture, since what is urgent was told already."""
    if deps.watch is not None:
        escapes = paths.known_of(deps.watch.escapes(paths, seen.canaries))
        on = deps.watch.on
        why = (packet_socket() or "") if on is False else None
        seen = replace(seen, leak_watch=on, watch_refused=why, escapes=escapes)
    if deps.pulses is not None:
        seen = replace(seen, quality=deps.pulses.quality(seen.link))
    return seen


def _leaks(seen: Observation, policy: Policy) -> bool:
    return judge(seen, policy).state is State.LEAKING


def _is_proved(seen: Observation, policy: Policy) -> bool:
    """Whether it leaks whatever can still be learned of where resolvers ask from."""
    return _leaks(without(undecided(seen, policy), seen), policy)


def _outside(survey: Survey, found: tuple[Canary, ...], policy: Policy) -> dict[str, frozenset[IPNetwork]]:
    """Where packets by each way out beside the tunnel come out: seen by a canary, or home where there is one way."""
    home = policy.home_networks if len(survey.uplinks) == 1 else ()
    beside = [c for c in found if c.probe is Probe.PHYSICAL and c.address is not None]
    return {
        i.name: seen
        for i in survey.uplinks
        if (seen := frozenset((*home, *(ip_network(str(c.address)) for c in beside if c.interface == i.name))))
    }


def _with_pulses(pulses: PulseView, seen: Observation, paths: Paths, silent_for: float) -> Observation:
    """Add what the pulses saw; where nothing else answers, a late reply to one of them shows that the tunnel lives."""
    alive = any(c.answer is Answer.ANSWERED for c in seen.asked(Probe.DEFAULT))
    late = None if alive else pulses.canary(paths)
    return replace(
        seen,
        canaries=(*seen.canaries, late) if late else seen.canaries,
        pulses=pulses.works(),
        silent_for=0.0 if alive or late else silent_for,
    )


async def _beyond_dns(deps: RoundDeps, seen: Observation, paths: Paths) -> Observation:
    """Who answered in the place of nameservers may have done so for the canaries that ask one: others tell the exit."""
    silent = [f for f in (4, 6) if seen.exit(f) is None and any(c.family == f and c.address for c in seen.canaries)]
    others = [o for o in deps.plan(paths).others if o.family in silent]
    found = await asyncio.gather(*(o.ask() for o in others))
    seen = replace(seen, canaries=(*seen.canaries, *(c for c in found if c.answer is Answer.ANSWERED)))
    exit_ = seen.exit(4) or seen.exit(6)
    if found and exit_ and deps.places.due(exit_):
        await deps.places.gather(exit_)
    return seen


async def _slow_part(deps: RoundDeps, seen: Observation, policy: Policy, paths: Paths) -> Observation:
    exit_ = seen.exit(4) or seen.exit(6)
    async with asyncio.TaskGroup() as group:
        # The services learn nothing that a canary did not tell others already: none was seen leaking.
        placing = group.create_task(deps.places.gather(exit_)) if exit_ and deps.places.due(exit_) else None
        proxied = group.create_task(dns.intercepted(at=deps.no_dns))
        nameservers, zone = deps.nameservers(), deps.canary()
        rewriting = group.create_task(dns.rewritten(nameservers, zone))
        # Who may not read resolv.conf fails at every name, which says nothing of those who may.
        system = deps.system if nameservers else None
        tunnel_and_exit = (seen.link and (seen.link.name, seen.link.up), seen.exit(4), seen.exit(6))
        using = group.create_task(system.ask(zone, nameservers, tunnel_and_exit)) if system is not None else None
        connecting = group.create_task(tcp.beside(paths, seen.canaries, max_uplinks=MAX_UPLINKS))
        seen = await _lookups(deps, seen, policy, paths, nameservers, zone, rewriting)
        seen = await _with_origins(deps, seen, policy, paths, nameservers)
        if using is not None and not _leaks(seen, policy):
            seen = replace(seen, system_lookup=await using)
            seen = await _with_origins(deps, seen, policy, paths, nameservers)
        if _leaks(seen, policy):
            if placing is not None:
                await asyncio.wait([placing], timeout=_PLACES_EXTRA_S)
                placing.cancel()
            side = [task for task in (proxied, connecting, using, rewriting) if task is not None]
            if not all(task.done() for task in side):
                proxy = proxied.result() if proxied.done() else None
                for task in side:
                    task.cancel()
                return replace(seen, dns_intercepted=proxy or seen.dns_intercepted)
        if using is not None and seen.system_lookup is None:
            seen = replace(seen, system_lookup=await using)
        seen = replace(seen, canaries=(*seen.canaries, *await connecting))
        return replace(seen, dns_intercepted=await proxied or seen.dns_intercepted or False)


async def _lookups(
    deps: RoundDeps,
    seen: Observation,
    policy: Policy,
    paths: Paths,
    nameservers: tuple[dns.Nameserver, ...],
    zone: dns.CanaryZone | None,
    rewriting: asyncio.Task[bool | None],
) -> Observation:
    """Ask each nameserver; what proves a leak waits for no other answer."""

    def with_lookups(asked: dns.ResolverAnswers) -> Observation:
        found = replace(
            seen,
            resolvers=_of_use(asked.sightings, nameservers),
            # Somebody who answers in our server's name stands between.
            dns_intercepted=asked.forged or None,
            # What a resolver makes up must be known before its word proves anything.
            dns_rewritten=rewriting.result() if rewriting.done() else True,
        )
        return replace(found, places=_places(deps, found, policy))

    def proves(asked: dns.ResolverAnswers) -> bool:
        return _is_proved(with_lookups(asked), policy)

    others = dns.besides(nameservers, deps.neighbors())
    asked = await dns.resolvers(paths, (*nameservers, *others), zone, enough=proves)
    if not rewriting.done() and proves(asked):
        return replace(with_lookups(asked), dns_rewritten=None)
    await rewriting
    return with_lookups(asked)


async def _with_origins(
    deps: RoundDeps, seen: Observation, policy: Policy, paths: Paths, nameservers: tuple[dns.Nameserver, ...]
) -> Observation:
    """Learn whose networks addresses are in. Only what nothing else explains is worth a stranger's answer."""

    def now() -> Observation:
        return replace(seen, places=_places(deps, seen, policy))

    odd = unexplained(seen, policy)
    if deps.origins is not None and (odd or rests_on_home(seen, policy)):
        addresses = (*odd, *(a for a in (seen.exit(4), seen.exit(6)) if a), *_homes(seen, policy))
        await deps.origins.learn(addresses, nameservers, paths, enough=lambda: _is_proved(now(), policy))
    return now()


def _of_use(
    found: tuple[ResolverSighting, ...], nameservers: tuple[dns.Nameserver, ...]
) -> tuple[ResolverSighting, ...]:
    """A nameserver of resolv.conf that does not answer is trouble; one that a packet went to may be anything."""
    own = {dns.plain(s.address) for s in nameservers}
    return tuple(s for s in found if s.answer is Answer.ANSWERED or s.nameserver in own)


def _places(deps: RoundDeps, seen: Observation, policy: Policy) -> tuple[Place, ...]:
    addresses = tuple(_addresses(seen, policy))
    origins = deps.origins.known(addresses) if deps.origins is not None else ()
    return (*deps.places.known(addresses)[: limits.MAX_PER_OBSERVATION - len(origins)], *origins)[
        : limits.MAX_PER_OBSERVATION
    ]


def _homes(seen: Observation, policy: Policy) -> Iterable[IPAddress]:
    """One address of each home network, those included that this round itself saw beside a tunnel that works."""
    return (n.network_address for n in learned_home(seen, policy).home_networks)


def _addresses(seen: Observation, policy: Policy) -> Iterable[IPAddress]:
    """Whose places matter: the exits', the resolvers' and home's, to compare their networks."""
    yield from (a for a in (seen.exit(4), seen.exit(6)) if a)
    yield from (s.egress for s in seen.resolvers if s.egress)
    yield from seen.system_lookup.egress if seen.system_lookup else ()
    yield from _homes(seen, policy)
