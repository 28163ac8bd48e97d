"""The reference agent: it runs outside the tunnels of a site, and reports the home connection and its public address.

It probes the default route, as any program would use it, and nothing else: no other route, no nameserver, no
geolocation service, no packets.
"""

import asyncio
import contextlib
import logging
from dataclasses import replace

from vpn_sentinel.agent.base import Base, health, report_target, uplink_routes, watch_network
from vpn_sentinel.agent.net.interfaces import Paths, Survey, survey
from vpn_sentinel.agent.probes.canary import canaries
from vpn_sentinel.agent.rounds.canary_plan import canary_plan
from vpn_sentinel.agent.rounds.scheduler import Scheduler
from vpn_sentinel.agent.sensors.pulse import PulseSensor
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.agent.uplink.reports import Reporter
from vpn_sentinel.agent.uplink.uploader import Uploader
from vpn_sentinel.domain.judge import judge_reference
from vpn_sentinel.domain.observation import Answer, Observation, Probe, Trigger
from vpn_sentinel.domain.verdict import Verdict
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)


async def run(settings: AgentSettings, clock: Clock, stop: asyncio.Event) -> None:
    """Run until `stop` is set. Raises SettingError when it cannot start."""
    base = Base(settings, clock)
    kernel, triggers, echoes = base.kernel, base.triggers, base.echoes

    def survey_now() -> Survey:
        # Without outside interfaces no canary is sent past a tunnel, if there is one.
        return replace(survey(kernel), uplinks=(), beside=())

    uploader = Uploader(
        report_target(settings),
        base.spool,
        base.http,
        clock,
        routes=uplink_routes(kernel, survey_now),
        greeted=lambda event: echoes.greet(event.echo),
    )
    reports = Reporter(base.spool, uploader)

    def changed(trigger: Trigger) -> None:
        uploader.network_changed()
        triggers.put(trigger)

    pulse = PulseSensor(
        settings.pulse,
        echoes=lambda: echoes.targets,
        on_change=lambda: changed(Trigger.CANARY),
        acked=lambda: uploader.acked_at,
        boottime=clock.boottime,
        wall=clock.wall,
    )

    def done(seen: Observation, verdict: Verdict) -> None:
        reports.round(seen, verdict)
        if not seen.broken:
            pulse.saw(seen)

    def paused() -> None:
        pulse.paused()
        changed(Trigger.RECHECK)

    def network_changed() -> None:
        pulse.reset()
        changed(Trigger.NETWORK)

    scheduler = Scheduler(
        lambda trigger, _policy: _observe(base, pulse, survey_now(), trigger),
        done,
        triggers=triggers,
        state=base.rounds,
        interval=settings.interval,
        clock=clock,
        judge=lambda seen, _: judge_reference(seen),
        paused=paused,
    )
    health_facts = health(base, uploader)
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        stack.callback(base.close)
        if kernel is not None:
            watch_network(stack, network_changed, survey_now())
        server = await health_facts.serve(settings.health_host, settings.health_port)
        stack.callback(server.close)
        log.info("reference agent started", extra={"client_id": settings.client_id, "site": settings.site})
        tasks = [group.create_task(work) for work in (scheduler.run(), pulse.run(), uploader.run())]
        await stop.wait()
        for task in tasks:
            task.cancel()
    log.info("reference agent stopped")


async def _observe(base: Base, pulse: PulseSensor, around: Survey, trigger: Trigger) -> Observation:
    """Run one round: the canaries of a tunnel's agent, on the default route alone."""
    started_at, silent_for = base.clock.boottime(), pulse.silent_for()
    paths = Paths(base.kernel, around)
    asked = replace(canary_plan(base.settings.probes, base.http, base.echoes.targets, paths), gateway=None)
    found = await canaries(asked, paths)
    alive = any(c.probe is Probe.DEFAULT and c.answer is Answer.ANSWERED for c in found)
    return Observation(
        trigger=trigger,
        interfaces=around.names(),
        canaries=found,
        quality=pulse.quality(None),
        pulses=pulse.works(),
        silent_for=0.0 if alive else silent_for,
        took_ms=round((base.clock.boottime() - started_at) * 1000, 1),
    )
