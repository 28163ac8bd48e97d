"""The reference agent: runs beside the tunnels of a site, and tells how its home connection is and where it comes out.

It asks what any program would, on the default route, and nothing else: no canary beside it, no nameserver, no
geolocation service, no packet watched.
"""

import asyncio
import contextlib
import logging
from dataclasses import replace

from vpn_sentinel import __version__
from vpn_sentinel.agent.app import Echoes, watch_network
from vpn_sentinel.agent.cycle import Cycle
from vpn_sentinel.agent.equipment import TCP, flock, http_client, open_kernel
from vpn_sentinel.agent.health import Health, Signs
from vpn_sentinel.agent.http import split
from vpn_sentinel.agent.interfaces import Paths, Survey, survey
from vpn_sentinel.agent.names import Names
from vpn_sentinel.agent.probes.canary import canaries
from vpn_sentinel.agent.sensors.pulse import Pulse
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.agent.spool import Spool, SpoolInUseError
from vpn_sentinel.agent.spoolfile import check_folder
from vpn_sentinel.agent.uplink.conversation import Destination, Ground
from vpn_sentinel.agent.uplink.courier import Courier
from vpn_sentinel.agent.uplink.session import Greeted
from vpn_sentinel.domain.observation import Answer, Observation, Probe, Trigger
from vpn_sentinel.domain.policy import IPAddress, Policy
from vpn_sentinel.domain.verdict import State, Verdict, judge_reference
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError
from vpn_sentinel.wire import codec
from vpn_sentinel.wire.messages import PROTOCOL, Hello

log = logging.getLogger(__name__)


async def run(settings: AgentSettings, clock: Clock, stop: asyncio.Event) -> None:  # noqa: C901 - wiring
    """Run until `stop` is set. Raises SettingError when it cannot start."""
    if not settings.api_key:
        raise SettingError(
            "VPN_SENTINEL_API_KEY", "is not set: on the server, `vpn-sentinel token create NAME` makes one"
        )
    started = clock.boottime()
    names = Names()
    http = http_client(settings.probes, names)
    try:
        check_folder(settings.data_dir)
        spool = Spool(settings.data_dir / f"agent-{settings.client_id}.sqlite", clock)
    except OSError as e:
        raise SettingError("VPN_SENTINEL_DATA_DIR", f"{settings.data_dir}: {e.strerror}") from e
    except SpoolInUseError as e:
        raise SettingError("VPN_SENTINEL_DATA_DIR", str(e)) from e
    kernel = open_kernel()
    echoes = Echoes()

    def look_around() -> Survey:
        # Without a physical interface no canary is sent beside a tunnel, should there be one.
        return replace(survey(kernel), physical=None)

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

    def greeted(event: Greeted) -> None:
        hosts = [split(url).host for url in settings.urls]
        echoes.learn(event.echo, tuple(a for host in hosts for a in names.known(host)))

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
                policy=settings.probes.policy,
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

    async def look(trigger: Trigger, _policy: Policy) -> Observation:
        began, silent_for = clock.boottime(), pulse.silent_for()
        around = look_around()
        paths = Paths(kernel, around)
        found = await canaries(replace(flock(settings.probes, http, echoes.targets, paths), gateway=None), paths)
        alive = any(c.probe is Probe.DEFAULT and c.answer is Answer.ANSWERED for c in found)
        return Observation(
            trigger=trigger,
            interfaces=around.names(),
            canaries=found,
            quality=pulse.quality(None),
            pulses=pulse.works(),
            silent_for=0.0 if alive else silent_for,
            took_ms=round((clock.boottime() - began) * 1000, 1),
        )

    def done(seen: Observation, verdict: Verdict) -> None:
        mark = (verdict.state, tuple(f.code for f in verdict.findings), seen.exit(4), seen.exit(6))
        spool.append(codec.encode(seen), routine=mark == marks[0])
        marks[0] = mark
        pulse.saw(seen)
        if verdict.state is State.DOWN:
            courier.hurry()
        courier.wake()

    cycle = Cycle(
        look,
        done,
        policy=settings.probes.policy,
        interval=settings.interval,
        clock=clock,
        judge=lambda seen, _: judge_reference(seen),
    )

    def changed(trigger: Trigger) -> None:
        courier.kick()
        cycle.bell.ring(trigger)

    def network_changed() -> None:
        pulse.reset()
        changed(Trigger.NETWORK)

    pulse = Pulse(
        settings.pulse,
        echoes=lambda: echoes.targets,
        ring=lambda: changed(Trigger.CANARY),
        acked=lambda: courier.acked_at,
        boottime=clock.boottime,
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
        if kernel is not None:
            stack.callback(kernel.close)
            watch_network(stack, network_changed, look_around())
        server = await health.serve(settings.health_host, settings.health_port)
        stack.callback(server.close)
        log.info("reference agent started", extra={"client_id": settings.client_id, "site": settings.site})
        tasks = [group.create_task(work) for work in (cycle.run(), pulse.run(), courier.run())]
        await stop.wait()
        for task in tasks:
            task.cancel()
    log.info("reference agent stopped")
