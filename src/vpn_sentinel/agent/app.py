"""The agent put together: one long function, one task group."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel import __version__
from vpn_sentinel.agent import round as rounds
from vpn_sentinel.agent.asides import Asides
from vpn_sentinel.agent.containment.surroundings import Surroundings
from vpn_sentinel.agent.cycle import Cycle
from vpn_sentinel.agent.equipment import (
    TCP,
    chosen_services,
    flock,
    http_client,
    open_databases,
    open_kernel,
    portal_beside,
)
from vpn_sentinel.agent.health import Health, Signs
from vpn_sentinel.agent.http import split
from vpn_sentinel.agent.interfaces import Paths, Survey, survey
from vpn_sentinel.agent.introspect.witnesses import Witnesses
from vpn_sentinel.agent.leakwatch.watch import LeakWatch
from vpn_sentinel.agent.names import Names, NotFoundError
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.agent.probes.place import Places
from vpn_sentinel.agent.probes.targets import ServerEcho, Target
from vpn_sentinel.agent.reactions import Reactions
from vpn_sentinel.agent.sensors.netlink import NetworkSensor
from vpn_sentinel.agent.sensors.pathmtu import PathMtu
from vpn_sentinel.agent.sensors.pulse import Pulse
from vpn_sentinel.agent.sensors.resolver import ResolverWatch
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.agent.spool import Spool, SpoolInUseError
from vpn_sentinel.agent.spoolfile import check_folder
from vpn_sentinel.agent.uplink.conversation import Destination, Ground
from vpn_sentinel.agent.uplink.courier import Courier
from vpn_sentinel.agent.uplink.session import Greeted
from vpn_sentinel.domain.observation import Observation, Path, Trigger
from vpn_sentinel.domain.policy import IPAddress, Policy, is_public
from vpn_sentinel.domain.verdict import State, Verdict
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError
from vpn_sentinel.wire import codec
from vpn_sentinel.wire.messages import PROTOCOL, Echo, Hello

log = logging.getLogger(__name__)

_SEEK_APART: Final = 60.0  # seconds


@dataclass(slots=True)
class Echoes:
    """The server's UDP echo, as its last Welcome told: one target for each family of its public addresses."""

    targets: tuple[Target, ...] = field(default=())
    greeted: asyncio.Event = field(default_factory=asyncio.Event)

    async def seek(self, names: Names, hosts: Sequence[str], relearn: Callable[[], None]) -> None:
        """Look up the server's other names: where reports go over the LAN, nobody else asks for the public one's."""
        while True:
            await self.greeted.wait()
            self.greeted.clear()
            for host in hosts:
                if not names.known(host):
                    with contextlib.suppress(NotFoundError):  # the next greeting, or the next minute, tries again
                        await names.addresses(host)
            relearn()
            if not all(names.known(host) for host in hosts):
                self.greeted.set()
            await asyncio.sleep(_SEEK_APART)

    def learn(self, echo: Echo | None, addresses: tuple[IPAddress, ...]) -> None:
        if echo is None:
            self.targets = ()
            return
        ident, key = bytes.fromhex(echo.id), bytes.fromhex(echo.key)
        # A server on the LAN or on this machine does not see where we leave for the internet.
        public = {a.version: a for a in reversed(addresses) if is_public(a)}
        self.targets = tuple(ServerEcho(public[v], echo.port, ident, key) for v in sorted(public))


def watch_network(stack: contextlib.AsyncExitStack, changed: Callable[[], None], now: Survey) -> None:
    """Listen to the kernel until `stack` ends; a sandbox that forbids it leaves the timer and the pulses."""
    try:
        sensor = NetworkSensor(changed, now.interfaces or ())
    except OSError as e:
        log.warning("changes of the network are not told here", extra={"reason": e.strerror})
        return
    stack.callback(sensor.close)
    sensor.start()


async def run(settings: AgentSettings, clock: Clock, stop: asyncio.Event) -> None:  # noqa: C901 - wiring
    """Run the agent until `stop` is set. Raises SettingError when it cannot start."""
    if not settings.api_key:
        raise SettingError(
            "VPN_SENTINEL_API_KEY", "is not set: on the server, `vpn-sentinel token create NAME` makes one"
        )
    probes = settings.probes
    started = clock.boottime()
    names = Names()
    http = http_client(probes, names)
    databases = open_databases(probes, clock)
    try:
        check_folder(settings.data_dir)
    except OSError as e:
        raise SettingError("VPN_SENTINEL_DATA_DIR", f"{settings.data_dir}: {e.strerror}") from e
    try:
        spool = Spool(settings.data_dir / f"agent-{settings.client_id}.sqlite", clock)
    except SpoolInUseError as e:
        raise SettingError("VPN_SENTINEL_DATA_DIR", str(e)) from e
    kernel = open_kernel()
    echoes = Echoes()
    canary_zone = dns.ToldZone()
    places = Places(http, chosen_services(probes), clock, look_up=databases.look_up, limit=min(probes.timeout, 5.0))

    witnesses = Witnesses(settings.introspect, http, clock, ring=lambda: cycle.bell.ring(Trigger.DEVICE))

    def look_around() -> Survey:
        found = survey(kernel, configured=probes.tunnel_interface, remembered=spool.fact("tunnel"))
        if found.tunnel is not None:
            spool.keep("tunnel", found.tunnel)
        return found

    watch = LeakWatch(
        tables=kernel,
        policy=probes.policy,
        clock=clock,
        told=lambda: leaked(),
        survey=look_around,
        endpoints=lambda: (*probes.tunnel_endpoints, *witnesses.endpoints()),
        meant=lambda: (a for url in settings.urls for a in names.known(split(url).host)),
        on_escape=lambda escape: reactions.escaped(escape),
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
        return not (beside and paths.has_own_way(target.address, target.port))

    pulse = Pulse(
        settings.pulse,
        echoes=lambda: echoes.targets,
        ring=lambda: pulse_changed(),
        fits=tells_of_the_tunnel,
        acked=lambda: courier.acked_at,
        boottime=clock.boottime,
    )
    eyes = rounds.Eyes(
        kernel=kernel,
        survey=look_around,
        flock=lambda paths: flock(
            probes, http, echoes.targets, paths, beside=watch.expect, silent_for=pulse.silent_for()
        ),
        places=places,
        clock=clock,
        watch=watch,
        canary=lambda: canary_zone.zone,
        sight=pulse,
        asides=Asides(
            claims=witnesses.look,
            forwarded_port=witnesses.forwarded_port,
            portal=portal_beside(probes, names, own=watch.expect),
        ),
    )

    def way(address: IPAddress, port: int) -> object:
        if kernel is None:
            return None
        try:
            route = kernel.route(address, port=port, protocol=TCP)
        except OSError:
            return None
        return route and (route.interface, route.source)

    def owns(address: IPAddress) -> bool:
        return kernel is None or look_around().owns(address)

    hosts = tuple(split(url).host for url in settings.urls)
    told: list[Echo | None] = [None]

    def learn_echoes() -> None:
        echoes.learn(told[0], tuple(a for host in hosts for a in names.known(host)))

    def greeted(event: Greeted) -> None:
        if canary_zone.learn(event.canary_zone, event.echo):
            cycle.bell.ring(Trigger.RECHECK)  # the first round had to ask strangers
        told[0] = event.echo
        learn_echoes()
        echoes.greeted.set()

    courier = Courier(
        Destination(
            urls=settings.urls,
            api_path=settings.api_path,
            key=settings.api_key,
            allow_insecure=settings.allow_insecure,
            hello=Hello(
                protocol=PROTOCOL,
                client_id=settings.client_id,
                spool="",
                version=__version__,
                interval=settings.interval,
                wall=0.0,
                policy=probes.policy,
                role=settings.role,
                site=settings.site,
            ),
        ),
        spool,
        http,
        clock,
        ground=Ground(way=way, owns=owns),
        greeted=greeted,
    )
    marks: list[object] = [None]

    def done(seen: Observation, verdict: Verdict) -> None:
        reactions.done(seen, verdict)  # first: what closes the way out waits for no disk
        mark = (verdict.state, tuple(f.code for f in verdict.findings), seen.exit(4), seen.exit(6))
        spool.append(codec.encode(seen), routine=mark == marks[0] and not seen.actions)
        marks[0] = mark
        pulse.saw(seen)
        path_mtu.saw(seen, verdict)
        resolver_watch.saw(seen, verdict, cycle.policy)
        if verdict.state in (State.DOWN, State.LEAKING):
            courier.hurry()
        courier.wake()

    def leaked() -> None:
        """A packet left outside the tunnel: tell of it now; the round that follows tells the rest."""
        around = look_around()
        escapes = watch.escapes(Paths(kernel, around))
        seen = Observation(
            trigger=Trigger.LEAK, link=around.link(), interfaces=around.names(), escapes=escapes, leak_watch=watch.on
        )
        spool.append(codec.encode(seen), routine=False)
        marks[0] = None  # the round after it is no repetition
        courier.wake()
        cycle.bell.ring(Trigger.LEAK)

    async def look(trigger: Trigger, policy: Policy) -> Observation:
        return reactions.add_to(await rounds.look(eyes, trigger, policy))

    cycle = Cycle(
        look,
        done,
        policy=probes.policy,
        interval=settings.interval,
        clock=clock,
    )

    def network_changed() -> None:
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
    health = Health(
        lambda: Signs(
            started,
            cycle.last_success,
            courier.acked_at,
            cycle.verdict.state if cycle.verdict else None,
            spool.pending,
        ),
        clock,
        settings.interval,
    )
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        stack.callback(spool.close)
        stack.callback(databases.close)
        stack.callback(reactions.close)
        if kernel is not None:
            stack.callback(kernel.close)
        stack.callback(watch.close)
        if kernel is not None:
            watch_network(stack, network_changed, look_around())
        server = await health.serve(settings.health_host, settings.health_port)
        stack.callback(server.close)
        log.info("agent started", extra={"client_id": settings.client_id, "version": __version__})
        works = (cycle, pulse, path_mtu, courier, resolver_watch, witnesses, reactions)
        tasks = [group.create_task(work.run()) for work in works]
        tasks.append(group.create_task(echoes.seek(names, hosts, learn_echoes)))
        await stop.wait()
        for task in tasks:
            task.cancel()
    log.info("agent stopped")
