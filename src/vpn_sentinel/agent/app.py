"""The agent put together: one long function, one task group."""

import asyncio
import contextlib
import gc
import logging

from vpn_sentinel import __version__
from vpn_sentinel.agent import round as rounds
from vpn_sentinel.agent.asides import Asides
from vpn_sentinel.agent.containment.surroundings import Surroundings
from vpn_sentinel.agent.cycle import Cycle
from vpn_sentinel.agent.endpoints import UDP
from vpn_sentinel.agent.equipment import (
    chosen_services,
    flock,
    http_client,
    open_databases,
    open_kernel,
    portal_beside,
    route_audit,
)
from vpn_sentinel.agent.footing import (
    Echoes,
    Repeats,
    destination,
    health,
    need_key,
    open_spool,
    routes,
    watch_network,
    way,
)
from vpn_sentinel.agent.http import split
from vpn_sentinel.agent.interfaces import Paths, Survey, Surveyor
from vpn_sentinel.agent.introspect.witnesses import Witnesses
from vpn_sentinel.agent.leakwatch.neighbors import Neighbor
from vpn_sentinel.agent.leakwatch.watch import LeakWatch
from vpn_sentinel.agent.names import Names
from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.agent.probes.origin import Origins
from vpn_sentinel.agent.probes.place import Places
from vpn_sentinel.agent.probes.system_resolver import SystemResolver
from vpn_sentinel.agent.probes.targets import Target
from vpn_sentinel.agent.reactions import Reactions
from vpn_sentinel.agent.sensors.pathmtu import PathMtu
from vpn_sentinel.agent.sensors.pulse import Pulse
from vpn_sentinel.agent.sensors.resolver import ResolverWatch
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.agent.uplink.courier import Courier
from vpn_sentinel.agent.uplink.session import Greeted
from vpn_sentinel.domain import resolvers
from vpn_sentinel.domain.observation import Observation, Path, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State, Verdict
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError
from vpn_sentinel.wire import codec

log = logging.getLogger(__name__)


async def run(settings: AgentSettings, clock: Clock, stop: asyncio.Event) -> None:  # noqa: C901 - wiring
    """Run the agent until `stop` is set. Raises SettingError when it cannot start."""
    need_key(settings)
    probes = settings.probes
    names = Names()
    http = http_client(probes, names)
    spool = open_spool(settings, clock)  # first: of a folder that cannot be used one line is enough
    try:
        databases = open_databases(probes, clock)
    except SettingError:
        spool.close()
        raise
    kernel = open_kernel()
    echoes = Echoes(names, tuple(split(url).host for url in settings.urls))
    canary_zone = dns.ToldZone()
    places = Places(http, chosen_services(probes), clock, look_up=databases.look_up, limit=min(probes.timeout, 5.0))

    witnesses = Witnesses(settings.introspect, http, clock, ring=lambda: cycle.bell.ring(Trigger.DEVICE))

    surveyor = Surveyor(kernel, configured=probes.tunnel_interface, memory=spool, only=probes.meant_outside.only)

    def look_around() -> Survey:
        found = surveyor.look()
        AS_USER.be(found.user)
        return found

    watch = LeakWatch(
        tables=kernel,
        policy=probes.policy,
        clock=clock,
        told=lambda: leaked(),
        survey=surveyor.look_anew,
        endpoints=lambda: (*probes.tunnel_endpoints, *witnesses.endpoints()),
        meant=lambda: (a for host in echoes.hosts for a in names.known(host)),
        on_escape=lambda escape: reactions.escaped(escape),
        declared=probes.meant_outside,
        wanted=probes.leak_watch,
        memory=spool,
        server_found=lambda: cycle.bell.ring(Trigger.NETWORK),
        on_neighbor=lambda neighbor: neighbor_found(neighbor),
        neighbor_left=lambda: cycle.bell.ring(Trigger.RECHECK),
    )
    reactions = Reactions(
        settings.reactions,
        Surroundings(
            kernel=kernel,
            tables=kernel,
            survey=look_around,
            endpoints=lambda: watch.endpoints,
            facts=spool,
            names=names,
            urls=settings.urls,
            policy=probes.policy,
            meant=probes.meant_outside,
        ),
        spool,
        http,
        clock,
        client_id=settings.client_id,
        control=settings.introspect,
    )

    def tells_of_the_tunnel(target: Target) -> bool:
        paths = Paths(kernel, look_around())
        beside = paths.of(target.address, target.port) is Path.OUTSIDE
        return not AS_USER.refused and not (beside and paths.has_own_way(target.address, target.port))

    pulse = Pulse(
        settings.pulse,
        echoes=lambda: echoes.targets,
        ring=lambda: pulse_changed(),
        fits=tells_of_the_tunnel,
        acked=lambda: courier.acked_at,
        boottime=clock.boottime,
        wall=clock.wall,
        way=way(kernel, UDP),
    )
    eyes = rounds.Eyes(
        kernel=kernel,
        survey=look_around,
        flock=lambda paths: flock(
            probes,
            http,
            echoes.targets,
            paths,
            silent_for=pulse.silent_for(),
            pulsed=bool(pulse.works()),
        ),
        places=places,
        clock=clock,
        watch=watch,
        came_out=surveyor.came_out,
        hurry=lambda: pulse.lossy and cycle.verdict is not None and cycle.verdict.state is State.PROTECTED,
        audit=route_audit(
            probes, lambda: watch.judged_by_route, lambda: (a for host in echoes.hosts for a in names.known(host))
        ),
        canary=lambda: canary_zone.zone,
        neighbors=lambda: () if AS_USER.refused else (dns.on_link(n.address, n.interface) for n in watch.neighbors),
        system=SystemResolver(boottime=clock.boottime),
        origins=Origins(clock, spool, services=places.about, names=names),
        sight=pulse,
        asides=Asides(
            claims=witnesses.look,
            forwarded_port=witnesses.forwarded_port,
            portal=portal_beside(probes, names),
        ),
    )

    def greeted(event: Greeted) -> None:
        if canary_zone.learn(event.canary_zone, event.echo):
            cycle.bell.ring(Trigger.RECHECK)  # the first round had to ask strangers
        echoes.greet(event.echo)
        if event.known is not None:
            cycle.learn_home(event.known.home)
            if surveyor.learn(event.known.device, event.known.beside):
                cycle.bell.ring(Trigger.NETWORK)

    courier = Courier(
        destination(settings),
        spool,
        http,
        clock,
        routes=routes(kernel, look_around),
        greeted=greeted,
    )
    repeats = Repeats()

    def done(seen: Observation, verdict: Verdict) -> None:
        reactions.done(seen, verdict)  # first: what closes the way out waits for no disk
        spool.append(codec.encode(seen), routine=repeats.again(seen, verdict))
        if not seen.broken:
            pulse.saw(seen)
            path_mtu.saw(seen, verdict)
            resolver_watch.saw(seen, verdict, cycle.policy)
            beside = (s.nameserver for s in seen.resolvers if resolvers.leak(s, seen, cycle.policy))
            watch.judged((s.nameserver for s in seen.resolvers), beside)
        if verdict.state in (State.DOWN, State.LEAKING):
            courier.hurry()
        courier.wake()
        if seen.trigger is Trigger.TIMER:
            gc.collect()  # of the little that is not set aside below: else it is left until there are megabytes of it

    def leaked() -> None:
        """A packet left outside the tunnel: tell of it now; the round that follows tells the rest."""
        around = look_around()
        paths = Paths(kernel, around)
        escapes = paths.known_of(watch.escapes(paths))
        seen = Observation(
            trigger=Trigger.LEAK,
            link=around.link(),
            interfaces=around.names(),
            # What routes send past the tunnel a kill switch may hold: the round tries it.
            routed=tuple(part for part in eyes.audit(around) or () if part.interface == around.tunnel),
            escapes=escapes,
            leak_watch=watch.on,
        )
        spool.append(codec.encode(seen), routine=False)
        repeats.forget()
        courier.wake()
        cycle.bell.ring(Trigger.LEAK)

    def neighbor_found(neighbor: Neighbor) -> None:
        """A program asks a nameserver of the LAN: where that asks from is news, unless each round asks it anyway.

        A forwarder on this host asks it as often as a round asks the forwarder: no news while it leaks.
        """
        leaks = cycle.verdict is not None and cycle.verdict.state is State.LEAKING
        if not leaks and dns.besides(dns.system_nameservers(), [dns.on_link(neighbor.address, neighbor.interface)]):
            cycle.bell.ring(Trigger.LEAK)

    async def look(trigger: Trigger, policy: Policy) -> Observation:
        resolver_watch.looks()
        return reactions.add_to(await rounds.look(eyes, trigger, policy))

    cycle = Cycle(
        look,
        done,
        policy=probes.policy,
        interval=settings.interval,
        clock=clock,
        paused=lambda: paused(),
    )

    def paused() -> None:
        pulse.paused()
        path_mtu.reset()
        courier.kick()
        cycle.bell.ring(Trigger.RECHECK)

    def network_changed() -> None:
        if kernel is not None:
            kernel.changed()
        watch.look(look_around())
        courier.kick()
        pulse.reset()
        path_mtu.reset()
        cycle.bell.ring(Trigger.NETWORK)

    def pulse_changed() -> None:
        courier.kick()
        cycle.bell.ring(Trigger.CANARY)

    path_mtu = PathMtu(pulse, lambda: Paths(kernel, look_around()), changed=lambda: cycle.bell.ring(Trigger.CANARY))
    resolver_watch = ResolverWatch(
        canary=lambda: canary_zone.zone,
        changed=lambda: cycle.bell.ring(Trigger.NETWORK),
        strayed=lambda: cycle.bell.ring(Trigger.CANARY),
    )
    signs = health(settings, clock, cycle, courier, spool)
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        stack.callback(spool.close)
        stack.callback(databases.close)
        stack.callback(reactions.close)
        if kernel is not None:
            stack.callback(kernel.close)
        stack.callback(watch.close)
        if kernel is not None:
            watch_network(stack, network_changed, look_around())
        server = await signs.serve(settings.health_host, settings.health_port)
        stack.callback(server.close)
        await witnesses.look(look_around())  # before a packet is doubted: where the tunnel's own packets go
        log.info("agent started", extra={"client_id": settings.client_id, "version": __version__})
        works = (cycle, pulse, path_mtu, courier, resolver_watch, witnesses, reactions, watch.carrier, watch.others)
        tasks = [group.create_task(work.run()) for work in works]
        tasks.append(group.create_task(echoes.seek()))
        gc.freeze()  # what is here by now stays
        await stop.wait()
        for task in tasks:
            task.cancel()
    log.info("agent stopped")
