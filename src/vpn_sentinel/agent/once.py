"""One round on this machine, judged here, for `check`: without spool, server or memory."""

import asyncio
from dataclasses import dataclass, replace
from typing import Final

from vpn_sentinel.agent.build import chosen_services, http_client, open_databases, open_kernel
from vpn_sentinel.agent.introspect.settings import IntrospectSettings
from vpn_sentinel.agent.introspect.witnesses import Witnesses
from vpn_sentinel.agent.leakwatch.watch import LeakWatch
from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.interfaces import Paths, Survey, Surveyor
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.agent.probes.canary import CanaryPlan
from vpn_sentinel.agent.probes.origin import Origins
from vpn_sentinel.agent.probes.place import Places
from vpn_sentinel.agent.probes.system_resolver import LOST_AFTER_S, SystemResolver
from vpn_sentinel.agent.probes.trace import whoami
from vpn_sentinel.agent.rounds import round as rounds
from vpn_sentinel.agent.rounds.canary_plan import canary_plan, path_to
from vpn_sentinel.agent.rounds.route_audit import RouteAudit
from vpn_sentinel.agent.settings import ProbeSettings
from vpn_sentinel.domain.judge import judge, with_learned_home
from vpn_sentinel.domain.observation import Answer, Observation, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import Verdict
from vpn_sentinel.runtime.clock import Clock

MIN_WATCH_S: Final = 1.0  # packets outside the tunnel are watched at least so long


@dataclass(frozen=True, slots=True)
class CheckResult:
    seen: Observation
    verdict: Verdict
    survey: Survey


async def check_once(
    settings: ProbeSettings, policy: Policy, clock: Clock, *, server: str | None = None
) -> CheckResult:
    """Run one round and judge it. `server` is the URL of a VPN Sentinel server to ask as well. Raises SettingError."""
    names = HostResolver()
    http = http_client(settings, names)
    databases = open_databases(settings, clock)
    kernel = open_kernel()
    around = Surveyor(kernel, configured=settings.tunnel_interface, only=settings.meant_outside.only_users)
    survey = around.look()
    AS_USER.switch_to(survey.user)

    # Only WireGuard, which is read from its device: other VPN programs need the agent's settings.
    witnesses = Witnesses(IntrospectSettings(), http, clock, on_change=lambda: None)
    watch = LeakWatch(
        tables=kernel,
        policy=policy,
        clock=clock,
        on_update=lambda _: None,
        survey=around.look_anew,
        endpoints=lambda: (*settings.tunnel_endpoints, *witnesses.endpoints()),
        declared=settings.meant_outside,
        wanted=settings.leak_watch,
    )

    def plan(paths: Paths) -> CanaryPlan:
        usual = canary_plan(settings, http, (), paths)
        usual = replace(usual, may_leave=policy.allows_outside)
        if server is None:
            return usual
        path = path_to(server, paths)
        return replace(usual, also=(lambda: whoami(http, server, path),))

    places = Places(http, chosen_services(settings), clock, look_up=databases.look_up, limit=min(settings.timeout, 4.0))
    deps = rounds.RoundDeps(
        kernel=kernel,
        survey=around.look,
        plan=plan,
        places=places,
        clock=clock,
        neighbors=lambda: () if AS_USER.refused else (dns.on_link(n.address, n.interface) for n in watch.neighbors),
        # No later round can take a late answer, or find that there is none.
        system=SystemResolver(boottime=clock.boottime, patience=LOST_AFTER_S + 0.1),
        origins=Origins(clock, services=places.about, names=names),
        watch=watch,
        learn_egress=around.learn_exits,
        audit=RouteAudit(settings).read,
    )
    try:
        started = clock.boottime()
        await witnesses.look(survey)  # finds the tunnel's endpoints before the first packet is judged
        watch.update(survey)
        if watch.carrier.open:
            await watch.carrier.settle()
        async with asyncio.TaskGroup() as group:
            # Packets in doubt wait for these trials, and only few can wait.
            trying = [group.create_task(work.run()) for work in (watch.carrier, watch.others)]
            seen = await rounds.observe(deps, Trigger.START, policy)
            if watch.on:
                # A round may take milliseconds; programs that use the tunnel get some time to send packets.
                await asyncio.sleep(max(0.0, started + MIN_WATCH_S - clock.boottime()))
            for task in trying:
                task.cancel()
        if watch.on:
            await watch.settle()
            paths = Paths(kernel, survey)
            seen = replace(seen, escapes=paths.known_of(watch.escapes(paths, seen.canaries)))
            seen = await with_neighbors(seen, deps, paths)
    finally:
        watch.close()
        databases.close()
        if kernel is not None:
            kernel.close()
    return CheckResult(seen, judge(seen, with_learned_home(seen, policy)), survey)


async def with_neighbors(seen: Observation, deps: rounds.RoundDeps, paths: Paths) -> Observation:
    """Ask the nameservers of the LAN that programs have asked since the round as well."""
    asked = {s.nameserver for s in seen.resolvers}
    fresh = [n for n in dns.besides(deps.nameservers(), deps.neighbors()) if dns.plain(n.address) not in asked]
    if not fresh:
        return seen
    survey = (await dns.resolvers(paths, fresh)).sightings
    return replace(seen, resolvers=(*seen.resolvers, *(s for s in survey if s.answer is Answer.ANSWERED)))
