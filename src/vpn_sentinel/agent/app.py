"""The agent put together, downwards: whatever is handed on is there already, and nothing names what is made later.

`_sense` makes what notices a change, `_look` what a round looks with, `_act` what becomes of what a round saw.
"""

import asyncio
import contextlib
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

from vpn_sentinel import __version__
from vpn_sentinel.agent.base import Base, destination, health, routes, watch_network, way
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
    """What all three steps stand on."""

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
        self.surveyor = Surveyor(self.kernel, configured=probes.tunnel_interface, memory=self.spool, only=outside.only)
        self.zone = dns.LearnedZone()
        self.audit = RouteAudit(probes, self.echoes.addresses)
        self.uploader = Uploader(
            destination(settings),
            self.spool,
            self.http,
            clock,
            routes=routes(self.kernel, self.survey),
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
        """The server said who it is, and what it remembers."""
        if self.zone.learn(event.canary_zone, event.echo):
            self.triggers.put(Trigger.RECHECK)  # the first round had to ask strangers
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
    """Whatever gives reasons for a round, and tells it what it saw meanwhile."""

    witnesses: Witnesses
    watch: LeakWatch
    pulse: PulseSensor
    path_mtu: PathMtu
    resolver_watch: ResolverWatch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Actors:
    """Whatever works on what was seen. `changed` is called when the kernel tells of another network."""

    reactions: Reactions
    scheduler: Scheduler
    changed: Callable[[], None]


async def run(settings: AgentSettings, clock: Clock, stop: asyncio.Event) -> None:
    """Run the agent until `stop` is set. Raises SettingError when it cannot start."""
    base = _AgentBase(settings, clock)
    sensors = _sense(base)
    actors = _act(base, sensors, _look(base, sensors))
    witnesses, watch = sensors.witnesses, sensors.watch
    signs = health(base, base.uploader)
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        stack.callback(base.close)
        stack.callback(actors.reactions.close)
        stack.callback(watch.close)
        if base.kernel is not None:
            watch_network(stack, actors.changed, base.survey())
        server = await signs.serve(settings.health_host, settings.health_port)
        stack.callback(server.close)
        await witnesses.look(base.survey())  # before a packet is doubted: where the tunnel's own packets go
        log.info("agent started", extra={"client_id": settings.client_id, "version": __version__})
        works = (
            actors.scheduler, sensors.pulse, sensors.path_mtu, base.uploader, sensors.resolver_watch, witnesses,
            actors.reactions, watch.carrier, watch.others, base.echoes,
        )  # fmt: skip
        tasks = [group.create_task(work.run()) for work in works]
        gc.freeze()  # what is here by now stays
        await stop.wait()
        for task in tasks:
            task.cancel()
    log.info("agent stopped")


def _sense(base: _AgentBase) -> _Sensors:
    """Make what notices a change between rounds, and gives the reason for the next."""
    settings, clock, triggers, uploader = base.settings, base.clock, base.triggers, base.uploader
    witnesses = Witnesses(settings.introspect, base.http, clock, on_change=lambda: triggers.put(Trigger.DEVICE))

    def leaked(watch: LeakWatch) -> None:
        """A packet left outside the tunnel: tell of it now; the round that follows tells the rest."""
        around = base.survey()
        paths = Paths(base.kernel, around)
        escapes = paths.known_of(watch.escapes(paths))
        seen = Observation(
            trigger=Trigger.LEAK,
            link=around.link(),
            interfaces=around.names(),
            # What routes send past the tunnel a kill switch may hold: the round tries it.
            routed=tuple(
                part for part in base.audit.look(around, watch.judged_by_route) or () if part.interface == around.tunnel
            ),
            escapes=escapes,
            leak_watch=watch.on,
        )
        base.reports.between_rounds(seen)
        triggers.put(Trigger.LEAK)

    def neighbor_found(neighbor: Neighbor) -> None:
        """A program asks a nameserver of the LAN: where that asks from is news, unless each round asks it anyway.

        A forwarder on this host asks it as often as a round asks the forwarder: no news while it leaks.
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

    def tells_of_the_tunnel(target: Target) -> bool:
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
        fits=tells_of_the_tunnel,
        acked=lambda: uploader.acked_at,
        boottime=clock.boottime,
        wall=clock.wall,
        route=way(base.kernel, UDP),
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


def _look(base: _AgentBase, sensors: _Sensors) -> rounds.RoundDeps:
    """Make what each round looks with."""
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
        came_out=base.surveyor.learn_exits,
        hurry=lambda: pulse.lossy and base.rounds.state is State.PROTECTED,
        audit=base.audit.look,
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
    """Make what has rounds run, and what becomes of them: reports, and what is done about a leak."""
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

    async def look(trigger: Trigger, policy: Policy) -> Observation:
        sensors.resolver_watch.round_begins()
        return reactions.add_to(await rounds.look(deps, trigger, policy))

    def done(seen: Observation, verdict: Verdict) -> None:
        reactions.done(seen, verdict)  # first: what closes the way out waits for no disk
        base.reports.round(seen, verdict)
        if not seen.broken:
            policy = base.rounds.policy
            pulse.saw(seen)
            path_mtu.saw(seen, verdict)
            sensors.resolver_watch.saw(seen, verdict, policy)
            beside = (s.nameserver for s in seen.resolvers if resolvers.leak(s, seen, policy))
            watch.judged((s.nameserver for s in seen.resolvers), beside)
        if seen.trigger is Trigger.TIMER:
            gc.collect()  # of the little that is not frozen: else it is left until there are megabytes of it

    def paused() -> None:
        pulse.paused()
        path_mtu.reset()
        base.uploader.network_changed()
        base.triggers.put(Trigger.RECHECK)

    def network_changed() -> None:
        if base.kernel is not None:
            base.kernel.changed()
        watch.look(base.survey())
        base.uploader.network_changed()
        pulse.reset()
        path_mtu.reset()
        base.triggers.put(Trigger.NETWORK)

    scheduler = Scheduler(
        look,
        done,
        triggers=base.triggers,
        state=base.rounds,
        interval=settings.interval,
        clock=base.clock,
        paused=paused,
    )
    return _Actors(reactions=reactions, scheduler=scheduler, changed=network_changed)
