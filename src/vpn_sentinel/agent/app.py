"""The agent put together: one long function, one task group."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from vpn_sentinel import __version__
from vpn_sentinel.agent import round as rounds
from vpn_sentinel.agent.cycle import Cycle
from vpn_sentinel.agent.equipment import TCP, chosen_services, flock, http_client, open_databases, open_kernel
from vpn_sentinel.agent.health import Health, Signs
from vpn_sentinel.agent.http import split
from vpn_sentinel.agent.interfaces import Survey, survey
from vpn_sentinel.agent.names import Names
from vpn_sentinel.agent.probes.place import Places
from vpn_sentinel.agent.probes.targets import ServerEcho, Target
from vpn_sentinel.agent.sensors.beat import Beat
from vpn_sentinel.agent.sensors.netlink import NetworkSensor
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.agent.spool import Spool, SpoolInUseError
from vpn_sentinel.agent.spoolfile import check_folder
from vpn_sentinel.agent.uplink.conversation import Destination, Ground
from vpn_sentinel.agent.uplink.courier import Courier
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.domain.policy import IPAddress, is_public
from vpn_sentinel.domain.verdict import Verdict
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError
from vpn_sentinel.wire import codec
from vpn_sentinel.wire.messages import PROTOCOL, Echo, Hello

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Echoes:
    """The server's UDP echo, as its last Welcome told: one target for each family of its public addresses."""

    targets: tuple[Target, ...] = field(default=())

    def learn(self, echo: Echo | None, addresses: tuple[IPAddress, ...]) -> None:
        if echo is None:
            self.targets = ()
            return
        ident, key = bytes.fromhex(echo.id), bytes.fromhex(echo.key)
        # A server on the LAN or on this machine does not see where we leave for the internet.
        public = {a.version: a for a in reversed(addresses) if is_public(a)}
        self.targets = tuple(ServerEcho(public[v], echo.port, ident, key) for v in sorted(public))


def watch_network(stack: contextlib.AsyncExitStack, changed: Callable[[], None], now: Survey) -> None:
    """Listen to the kernel until `stack` ends; a sandbox that forbids it leaves the timer and the beat."""
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
    databases = open_databases(probes)
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
    places = Places(http, chosen_services(probes), clock, databases=databases, limit=min(probes.timeout, 5.0))

    def look_around() -> Survey:
        found = survey(kernel, configured=probes.tunnel_interface, remembered=spool.fact("tunnel"))
        if found.tunnel is not None:
            spool.keep("tunnel", found.tunnel)
        return found

    eyes = rounds.Eyes(
        kernel=kernel,
        survey=look_around,
        flock=lambda paths: flock(probes, http, echoes.targets, paths),
        places=places,
        clock=clock,
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

    def greeted(echo: Echo | None) -> None:
        hosts = [split(url).host for url in settings.urls]
        echoes.learn(echo, tuple(a for host in hosts for a in names.known(host)))

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
        mark = (verdict.state, tuple(f.code for f in verdict.findings), seen.exit(4), seen.exit(6))
        spool.append(codec.encode(seen), routine=mark == marks[0])
        marks[0] = mark
        beat.saw(seen)
        courier.wake()

    cycle = Cycle(
        lambda trigger, policy: rounds.look(eyes, trigger, policy),
        done,
        policy=probes.policy,
        interval=settings.interval,
        clock=clock,
    )

    def network_changed() -> None:
        courier.kick()
        cycle.bell.ring(Trigger.NETWORK)

    def beat_changed() -> None:
        courier.kick()
        cycle.bell.ring(Trigger.CANARY)

    beat = Beat(settings.pulse, echoes=lambda: echoes.targets, ring=beat_changed)
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
        if kernel is not None:
            stack.callback(kernel.close)
            watch_network(stack, network_changed, look_around())
        server = await health.serve(settings.health_host, settings.health_port)
        stack.callback(server.close)
        log.info("agent started", extra={"client_id": settings.client_id, "version": __version__})
        tasks = [group.create_task(work) for work in (cycle.run(), beat.run(), courier.run())]
        await stop.wait()
        for task in tasks:
            task.cancel()
    log.info("agent stopped")
