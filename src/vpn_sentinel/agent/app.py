"""The wiring of the agent, top down: each part gets only parts that are made before it.

`_sense` makes what notices changes, `_round_deps` what a round needs, `_act` what handles a round's result.
"""

import asyncio
import contextlib
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

from vpn_sentinel import __version__
from vpn_sentinel.agent.base import Base, health, report_target, route_lookup, uplink_routes, watch_network
from vpn_sentinel.agent.build import chosen_services, open_databases, portal_beside
from vpn_sentinel.agent.containment.surroundings import Surroundings
from vpn_sentinel.agent.introspect.witnesses import Witnesses
from vpn_sentinel.agent.leakwatch.neighbors import Neighbor
from vpn_sentinel.agent.leakwatch.watch import LeakWatch
from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.endpoints import UDP
from vpn_sentinel.agent.net.interfaces import Paths, Survey, Surveyor
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.agent.probes.origin import Origins
from vpn_sentinel.agent.probes.place import Places
from vpn_sentinel.agent.probes.system_resolver import SystemResolver
from vpn_sentinel.agent.probes.targets import Target
from vpn_sentinel.agent.reactions import ReactionQueue, Reactions
from vpn_sentinel.agent.rounds import round as rounds
from vpn_sentinel.agent.rounds.canary_plan import canary_plan
from vpn_sentinel.agent.rounds.route_audit import RouteAudit
from vpn_sentinel.agent.rounds.scheduler import Scheduler
from vpn_sentinel.agent.rounds.side_probes import SideProbes
from vpn_sentinel.agent.sensors.pathmtu import PathMtu
from vpn_sentinel.agent.sensors.pulse import PulseSensor
from vpn_sentinel.agent.sensors.resolver import ResolverWatch
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.agent.uplink.reports import Reporter
from vpn_sentinel.agent.uplink.session import Greeted
from vpn_sentinel.agent.uplink.uploader import Uploader
from vpn_sentinel.domain import resolvers
from vpn_sentinel.domain.observation import Observation, Path, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State, Verdict
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError

log = logging.getLogger(__name__)


class _AgentBase(Base):
    """What all three steps need."""

    def __init__(self, settings: AgentSettings, clock: Clock) -> None:
        """Raises SettingError when a setting cannot be used."""
        super().__init__(settings, clock)
        probes = settings.probes
        try:
            self.databases = open_databases(probes, clock)
        except SettingError:
            super().close()
            raise
        outside = probes.meant_outside
        self.surveyor = Surveyor(
            self.kernel, configured=probes.tunnel_interface, memory=self.spool, only=outside.only_users
        )
        self.zone = dns.LearnedZone()
        self.audit = RouteAudit(probes, self.echoes.addresses)
        self.uploader = Uploader(
            report_target(settings),
            self.spool,
            self.http,
            clock,
            routes=uplink_routes(self.kernel, self.survey),
            greeted=self.greeted,
        )
        self.reports = Reporter(self.spool, self.uploader)
        self.reactions = ReactionQueue(settings.reactions.contain, self.survey, probes.policy)

    def survey(self) -> Survey:
        found = self.surveyor.look()
        AS_USER.switch_to(found.user)
        return found

    def paths(self) -> Paths:
        return Paths(self.kernel, self.survey())

    def greeted(self, event: Greeted) -> None:
        """Take the server's greeting: its zone and echo, and what it remembers of this tunnel."""
        if self.zone.learn(event.canary_zone, event.echo):
            self.triggers.put(Trigger.RECHECK)  # the first round had to ask outside services
        self.echoes.greet(event.echo)
        if event.known is not None:
            self.rounds.learn_home(event.known.home)
            if self.surveyor.learn(event.known.device, event.known.beside):
                self.triggers.put(Trigger.NETWORK)

    def close(self) -> None:
        self.databases.close()
        super().close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sensors:
    """What triggers rounds, and gives them what it saw between rounds."""

    witnesses: Witnesses
    watch: LeakWatch
    pulse: PulseSensor
    path_mtu: PathMtu
    resolver_watch: ResolverWatch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Actors:
    """What runs rounds and handles their results. `changed` is called when the kernel reports a change of the
    network.
    """

    reactions: Reactions
    scheduler: Scheduler
    changed: Callable[[], None]


async def run(settings: AgentSettings, clock: Clock, stop: asyncio.Event) -> None:
    """Run the agent until `stop` is set. Raises SettingError when it cannot start."""
    base = _AgentBase(settings, clock)
    sensors = _sense(base)
    actors = _act(base, sensors, _round_deps(base, sensors))
    witnesses, watch = sensors.witnesses, sensors.watch
    health_facts = health(base, base.uploader)
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        stack.callback(base.close)
        stack.callback(actors.reactions.close)
        stack.callback(watch.close)
        if base.kernel is not None:
            watch_network(stack, actors.changed, base.survey())
        server = await health_facts.serve(settings.health_host, settings.health_port)
        stack.callback(server.close)
        await witnesses.look(base.survey())  # finds the tunnel's endpoints before the first packet is judged
        log.info("agent started", extra={"client_id": settings.client_id, "version": __version__})
        works = (
            actors.scheduler, sensors.pulse, sensors.path_mtu, base.uploader, sensors.resolver_watch, witnesses,
            actors.reactions, watch.carrier, watch.others, base.echoes,
        )  # fmt: skip
        tasks = [group.create_task(work.run()) for work in works]
        gc.freeze()  # the objects made so far live until the end
        await stop.wait()
        for task in tasks:
            task.cancel()
    log.info("agent stopped")


def _sense(base: _AgentBase) -> _Sensors:
    """Make what notices changes between rounds, and triggers the next round."""
    settings, clock, triggers, uploader = base.settings, base.clock, base.triggers, base.uploader
    witnesses = Witnesses(settings.introspect, base.http, clock, on_change=lambda: triggers.put(Trigger.DEVICE))

    def leaked(watch: LeakWatch) -> None:
        """A packet left outside the tunnel: report it now; the round that follows reports the rest."""
        around = base.survey()
        paths = Paths(base.kernel, around)
        escapes = paths.known_of(watch.escapes(paths))
        seen = Observation(
            trigger=Trigger.LEAK,
            link=around.link(),
            interfaces=around.names(),
            # A kill switch may block what routes send past the tunnel: the round tests that.
            routed=tuple(
                part for part in base.audit.read(around, watch.judged_by_route) or () if part.interface == around.tunnel
            ),
            escapes=escapes,
            leak_watch=watch.on,
        )
        base.reports.between_rounds(seen)
        triggers.put(Trigger.LEAK)

    def neighbor_found(neighbor: Neighbor) -> None:
        """A program asks a nameserver of the LAN: a round must find where that asks from, unless each round does.

        A forwarder on this host asks it whenever a round asks the forwarder: no reason for a round while it leaks.
        """
        found = [dns.on_link(neighbor.address, neighbor.interface)]
        if base.rounds.state is not State.LEAKING and dns.besides(dns.system_nameservers(), found):
            triggers.put(Trigger.LEAK)

    watch = LeakWatch(
        tables=base.kernel,
        policy=settings.probes.policy,
        clock=clock,
        on_update=leaked,
        survey=base.surveyor.look_anew,
        endpoints=lambda: (*settings.probes.tunnel_endpoints, *witnesses.endpoints()),
        meant=base.echoes.addresses,
        on_escape=base.reactions.escaped,
        declared=settings.probes.meant_outside,
        wanted=settings.probes.leak_watch,
        memory=base.spool,
        server_found=lambda: triggers.put(Trigger.NETWORK),
        on_neighbor=neighbor_found,
        neighbor_left=lambda: triggers.put(Trigger.RECHECK),
    )

    def is_usable_target(target: Target) -> bool:
        paths = base.paths()
        beside = paths.of(target.address, target.port) is Path.OUTSIDE
        return not AS_USER.refused and not (beside and paths.has_host_route(target.address, target.port))

    def pulse_changed() -> None:
        uploader.network_changed()
        triggers.put(Trigger.CANARY)

    pulse = PulseSensor(
        settings.pulse,
        echoes=lambda: base.echoes.targets,
        on_change=pulse_changed,
        fits=is_usable_target,
        acked=lambda: uploader.acked_at,
        boottime=clock.boottime,
        wall=clock.wall,
        route=route_lookup(base.kernel, UDP),
    )
    return _Sensors(
        witnesses=witnesses,
        watch=watch,
        pulse=pulse,
        path_mtu=PathMtu(pulse, base.paths, changed=lambda: triggers.put(Trigger.CANARY)),
        resolver_watch=ResolverWatch(
            canary=lambda: base.zone.zone,
            changed=lambda: triggers.put(Trigger.NETWORK),
            unexpected_egress=lambda: triggers.put(Trigger.CANARY),
        ),
    )


def _round_deps(base: _AgentBase, sensors: _Sensors) -> rounds.RoundDeps:
    """Make what each round needs."""
    probes, pulse, witnesses, watch = base.settings.probes, sensors.pulse, sensors.witnesses, sensors.watch
    places = Places(
        base.http,
        chosen_services(probes),
        base.clock,
        look_up=base.databases.look_up,
        limit=min(probes.timeout, 5.0),
    )
    return rounds.RoundDeps(
        kernel=base.kernel,
        survey=base.survey,
        plan=lambda paths: canary_plan(
            probes,
            base.http,
            base.echoes.targets,
            paths,
            silent_for=pulse.silent_for(),
            pulsed=bool(pulse.works()),
        ),
        places=places,
        clock=base.clock,
        watch=watch,
        learn_egress=base.surveyor.learn_exits,
        is_urgent=lambda: pulse.lossy and base.rounds.state is State.PROTECTED,
        audit=base.audit.read,
        canary=lambda: base.zone.zone,
        neighbors=lambda: () if AS_USER.refused else (dns.on_link(n.address, n.interface) for n in watch.neighbors),
        system=SystemResolver(boottime=base.clock.boottime),
        origins=Origins(base.clock, base.spool, services=places.about, names=base.names),
        pulses=pulse,
        side_probes=SideProbes(
            claims=witnesses.look,
            forwarded_port=witnesses.forwarded_port,
            portal=portal_beside(probes, base.names),
        ),
    )


def _act(base: _AgentBase, sensors: _Sensors, deps: rounds.RoundDeps) -> _Actors:
    """Make what runs rounds and handles their results: reports, and reactions to a leak."""
    settings, pulse, path_mtu, watch = base.settings, sensors.pulse, sensors.path_mtu, sensors.watch
    reactions = Reactions(
        settings.reactions,
        base.reactions,
        Surroundings(
            kernel=base.kernel,
            tables=base.kernel,
            survey=base.survey,
            endpoints=lambda: watch.endpoints,
            facts=base.spool,
            names=base.names,
            urls=settings.urls,
            policy=settings.probes.policy,
            meant=settings.probes.meant_outside,
        ),
        base.spool,
        base.http,
        base.clock,
        client_id=settings.client_id,
        control=settings.introspect,
    )

    async def run_round(trigger: Trigger, policy: Policy) -> Observation:
        sensors.resolver_watch.round_begins()
        return reactions.add_to(await rounds.observe(deps, trigger, policy))

    def done(seen: Observation, verdict: Verdict) -> None:
        reactions.done(seen, verdict)  # first, so that containment does not wait for the disk
        base.reports.round(seen, verdict)
        if not seen.broken:
            policy = base.rounds.policy
            pulse.saw(seen)
            path_mtu.saw(seen, verdict)
            sensors.resolver_watch.saw(seen, verdict, policy)
            beside = (s.nameserver for s in seen.resolvers if resolvers.leak(s, seen, policy))
            watch.judged((s.nameserver for s in seen.resolvers), beside)
        if seen.trigger is Trigger.TIMER:
            gc.collect()  # of the few objects that are not frozen: else megabytes pile up first

    def paused() -> None:
        pulse.paused()
        path_mtu.reset()
        base.uploader.network_changed()
        base.triggers.put(Trigger.RECHECK)

    def network_changed() -> None:
        if base.kernel is not None:
            base.kernel.changed()
        watch.update(base.survey())
        base.uploader.network_changed()
        pulse.reset()
        path_mtu.reset()
        base.triggers.put(Trigger.NETWORK)

    scheduler = Scheduler(
        run_round,
        done,
        triggers=base.triggers,
        state=base.rounds,
        interval=settings.interval,
        clock=base.clock,
        paused=paused,
    )
    return _Actors(reactions=reactions, scheduler=scheduler, changed=network_changed)
