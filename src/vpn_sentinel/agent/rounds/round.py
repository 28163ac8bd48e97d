"""One round: observe everything once, the most urgent first.

Canaries come first. If they show a leak or a dead tunnel, or the pulses show a new loss, that is reported at once.
Otherwise nameservers and geolocation services are asked, which can take some seconds.
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
from vpn_sentinel.domain.judge import judge, with_learned_home
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
from vpn_sentinel.domain.resolvers import undecided_egresses, unexplained_egresses, without_egresses
from vpn_sentinel.domain.unseen import rests_on_home
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.wire import limits

_PLACES_EXTRA_S: Final = 0.5  # the time for places while a DNS leak waits to be reported
_URGENT: Final = frozenset({State.LEAKING, State.DOWN})


class PulseView(Protocol):
    """What a round reads from the pulses: see `sensors.pulse.PulseSensor`."""

    def canary(self, paths: Paths) -> Canary | None: ...

    def silent_for(self) -> float: ...

    def quality(self, link: Link | None) -> Quality | None: ...

    def works(self) -> bool | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundDeps:
    """What a round needs. `survey` and `plan` are called in each round, since their results change.

    `learn_egress` takes the networks in which packets outside the tunnel come out, by interface; True when the survey
    changes by that. `is_urgent`: the pulses found something to report before nameservers and services are asked.
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
    learn_egress: Callable[[dict[str, frozenset[IPNetwork]]], bool] = lambda _: False
    is_urgent: Callable[[], bool] = lambda: False


async def observe(deps: RoundDeps, trigger: Trigger, policy: Policy) -> Observation:
    """Run one round. It takes about 0.3 s when all works, 1.3 s when the tunnel is dead, some seconds when DNS is."""
    start = deps.clock.boottime()
    survey = deps.survey()
    if deps.watch is not None:
        deps.watch.update(survey)
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
        if deps.learn_egress(_egress_networks(survey, found, policy)):
            survey = deps.survey()
            if deps.watch is not None:
                deps.watch.update(survey)
            if (fresh_parts := _audit(deps, survey)) != parts:
                trying.stop()
                parts, trying = fresh_parts, bypass.BypassProbes(group, fresh_parts or (), survey.tunnel)
        routed = await trying.results(lambda routed: _leaks(replace(seen, routed=routed), policy))
        seen = replace(seen, routed=None if parts is None else routed)
    if deps.pulses is not None:
        seen = _with_pulses(deps.pulses, seen, paths, silent_for)
    if judge(seen, policy).state not in _URGENT and not deps.is_urgent():
        seen = await _slow_part(deps, seen, policy, paths)
        if seen.dns_intercepted:
            seen = await _exit_without_dns(deps, seen, paths)
    seen = _with_watches(deps, seen, paths)
    return replace(seen, places=_places(deps, seen, policy), took_ms=round((deps.clock.boottime() - start) * 1000, 1))


def _audit(deps: RoundDeps, survey: Survey) -> tuple[Routed, ...] | None:
    return deps.audit(survey, () if deps.watch is None else deps.watch.judged_by_route)


def _with_watches(deps: RoundDeps, seen: Observation, paths: Paths) -> Observation:
    """Add the present state of what is watched all the time: leak watch and quality."""
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
    """Whether it leaks, whatever is still learned about the addresses that resolvers ask from."""
    return _leaks(without_egresses(undecided_egresses(seen, policy), seen), policy)


def _egress_networks(survey: Survey, found: tuple[Canary, ...], policy: Policy) -> dict[str, frozenset[IPNetwork]]:
    """The networks in which packets come out by each interface outside the tunnel.

    Those that canaries showed; and the home networks where there is one such interface.
    """
    home = policy.home_networks if len(survey.uplinks) == 1 else ()
    physical = [c for c in found if c.probe is Probe.PHYSICAL and c.address is not None]
    return {
        i.name: seen
        for i in survey.uplinks
        if (seen := frozenset((*home, *(ip_network(str(c.address)) for c in physical if c.interface == i.name))))
    }


def _with_pulses(pulses: PulseView, seen: Observation, paths: Paths, silent_for: float) -> Observation:
    """Add the pulses; where nothing else answers, a late reply to a pulse shows that the tunnel works."""
    alive = any(c.answer is Answer.ANSWERED for c in seen.asked(Probe.DEFAULT))
    late = None if alive else pulses.canary(paths)
    return replace(
        seen,
        canaries=(*seen.canaries, late) if late else seen.canaries,
        pulses=pulses.works(),
        silent_for=0.0 if alive or late else silent_for,
    )


async def _exit_without_dns(deps: RoundDeps, seen: Observation, paths: Paths) -> Observation:
    """Find the exit without DNS: what answers in place of nameservers may do so for canaries that ask one as well."""
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
        # Geolocation services learn no new address here: no canary has leaked.
        placing = group.create_task(deps.places.gather(exit_)) if exit_ and deps.places.due(exit_) else None
        proxied = group.create_task(dns.intercepted(at=deps.no_dns))
        nameservers, zone = deps.nameservers(), deps.canary()
        rewriting = group.create_task(dns.rewritten(nameservers, zone))
        # A user who may not read resolv.conf cannot resolve any name, which tells nothing about other users.
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
    """Ask each nameserver; once a leak is proved, wait for no further answer."""

    def with_lookups(asked: dns.ResolverAnswers) -> Observation:
        found = replace(
            seen,
            resolvers=_relevant(asked.sightings, nameservers),
            # Something in between answers in the server's name.
            dns_intercepted=asked.forged or None,
            # Until it is known whether resolvers rewrite answers, their answers prove nothing.
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
    """Learn whose networks addresses are in. Outside services are asked only for what nothing else explains."""

    def fresh_parts() -> Observation:
        return replace(seen, places=_places(deps, seen, policy))

    unexplained_addresses = unexplained_egresses(seen, policy)
    if deps.origins is not None and (unexplained_addresses or rests_on_home(seen, policy)):
        addresses = (*unexplained_addresses, *(a for a in (seen.exit(4), seen.exit(6)) if a), *_homes(seen, policy))
        await deps.origins.learn(addresses, nameservers, paths, enough=lambda: _is_proved(fresh_parts(), policy))
    return fresh_parts()


def _relevant(
    found: tuple[ResolverSighting, ...], nameservers: tuple[dns.Nameserver, ...]
) -> tuple[ResolverSighting, ...]:
    """Drop silent nameservers that only packets showed: silence matters for those of resolv.conf alone."""
    own = {dns.plain(s.address) for s in nameservers}
    return tuple(s for s in found if s.answer is Answer.ANSWERED or s.nameserver in own)


def _places(deps: RoundDeps, seen: Observation, policy: Policy) -> tuple[Place, ...]:
    addresses = tuple(_addresses(seen, policy))
    origins = deps.origins.known(addresses) if deps.origins is not None else ()
    return (*deps.places.known(addresses)[: limits.MAX_PER_OBSERVATION - len(origins)], *origins)[
        : limits.MAX_PER_OBSERVATION
    ]


def _homes(seen: Observation, policy: Policy) -> Iterable[IPAddress]:
    """One address of each home network, including those that this round found outside a tunnel that works."""
    return (n.network_address for n in with_learned_home(seen, policy).home_networks)


def _addresses(seen: Observation, policy: Policy) -> Iterable[IPAddress]:
    """The addresses whose places matter: of exits, resolvers and home, to compare their networks."""
    yield from (a for a in (seen.exit(4), seen.exit(6)) if a)
    yield from (s.egress for s in seen.resolvers if s.egress)
    yield from seen.system_lookup.egress if seen.system_lookup else ()
    yield from _homes(seen, policy)
