"""The reference agent: runs beside the tunnels of a site, and tells how its home connection is and where it comes out.

It asks what any program would, on the default route, and nothing else: no canary beside it, no nameserver, no
geolocation service, no packet watched.
"""

import asyncio
import contextlib
import logging
from dataclasses import replace

from vpn_sentinel.agent.cycle import Cycle
from vpn_sentinel.agent.equipment import flock, http_client, open_kernel
from vpn_sentinel.agent.footing import Echoes, Repeats, destination, health, need_key, open_spool, routes, watch_network
from vpn_sentinel.agent.http import split
from vpn_sentinel.agent.interfaces import Paths, Survey, survey
from vpn_sentinel.agent.names import Names
from vpn_sentinel.agent.probes.canary import canaries
from vpn_sentinel.agent.sensors.pulse import Pulse
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.agent.uplink.courier import Courier
from vpn_sentinel.domain.judge import judge_reference
from vpn_sentinel.domain.observation import Answer, Observation, Probe, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State, Verdict
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.wire import codec

log = logging.getLogger(__name__)


async def run(settings: AgentSettings, clock: Clock, stop: asyncio.Event) -> None:  # noqa: C901 - wiring
    """Run until `stop` is set. Raises SettingError when it cannot start."""
    need_key(settings)
    names = Names()
    http = http_client(settings.probes, names)
    spool = open_spool(settings, clock)
    kernel = open_kernel()
    echoes = Echoes(names, tuple(split(url).host for url in settings.urls))

    def look_around() -> Survey:
        # Without a physical interface no canary is sent beside a tunnel, should there be one.
        return replace(survey(kernel), uplinks=(), beside=())

    courier = Courier(
        destination(settings),
        spool,
        http,
        clock,
        routes=routes(kernel, look_around),
        greeted=lambda event: echoes.greet(event.echo),
    )
    repeats = Repeats()

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
        spool.append(codec.encode(seen), routine=repeats.again(seen, verdict))
        if not seen.broken:
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
        paused=lambda: paused(),
    )

    def paused() -> None:
        pulse.paused()
        changed(Trigger.RECHECK)

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
        wall=clock.wall,
    )
    signs = health(settings, clock, cycle, courier, spool)
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        stack.callback(spool.close)
        if kernel is not None:
            stack.callback(kernel.close)
            watch_network(stack, network_changed, look_around())
        server = await signs.serve(settings.health_host, settings.health_port)
        stack.callback(server.close)
        log.info("reference agent started", extra={"client_id": settings.client_id, "site": settings.site})
        tasks = [group.create_task(work) for work in (cycle.run(), pulse.run(), courier.run())]
        await stop.wait()
        for task in tasks:
            task.cancel()
    log.info("reference agent stopped")
