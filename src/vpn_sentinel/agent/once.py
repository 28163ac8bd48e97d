"""One round on this machine, judged here: what `check` does, without spool, server or memory."""

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
from vpn_sentinel.domain.judge import judge, learned_home
from vpn_sentinel.domain.observation import Answer, Observation, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import Verdict
from vpn_sentinel.runtime.clock import Clock

LISTEN_S: Final = 1.0  # seconds that packets outside the tunnel are watched for, at least


@dataclass(frozen=True, slots=True)
class Looked:
    seen: Observation
    verdict: Verdict
    survey: Survey


async def look_once(settings: ProbeSettings, policy: Policy, clock: Clock, *, server: str | None = None) -> Looked:
    """Look and judge. `server` is the address of a VPN Sentinel server that is asked as well. Raises SettingError."""
    names = HostResolver()
    http = http_client(settings, names)
    databases = open_databases(settings, clock)
    kernel = open_kernel()
    around = Surveyor(kernel, configured=settings.tunnel_interface, only=settings.meant_outside.only)
    found = around.look()
    AS_USER.switch_to(found.user)

    # Only WireGuard, which is asked of its device: what takes settings is the agent's.
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

    def whom(paths: Paths) -> CanaryPlan:
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
        plan=whom,
        places=places,
        clock=clock,
        neighbors=lambda: () if AS_USER.refused else (dns.on_link(n.address, n.interface) for n in watch.neighbors),
        # There is no round after this one that could hear a late answer, or that there is none.
        system=SystemResolver(boottime=clock.boottime, patience=LOST_AFTER_S + 0.1),
        origins=Origins(clock, services=places.about, names=names),
        watch=watch,
        came_out=around.learn_exits,
        audit=RouteAudit(settings).look,
    )
    try:
        started = clock.boottime()
        await witnesses.look(found)  # before a packet is doubted: where the tunnel's own packets go
        watch.look(found)
        if watch.carrier.open:
            await watch.carrier.settle()
        async with asyncio.TaskGroup() as group:
            # Packets that are in doubt wait for these, and not many can.
            trying = [group.create_task(work.run()) for work in (watch.carrier, watch.others)]
            seen = await rounds.look(deps, Trigger.START, policy)
            if watch.on:
                # A round may be over in milliseconds; programs behind the tunnel get a moment to show what they do.
                await asyncio.sleep(max(0.0, started + LISTEN_S - clock.boottime()))
            for task in trying:
                task.cancel()
        if watch.on:
            await watch.settle()
            paths = Paths(kernel, found)
            seen = replace(seen, escapes=paths.known_of(watch.escapes(paths, seen.canaries)))
            seen = await with_neighbors(seen, deps, paths)
    finally:
        watch.close()
        databases.close()
        if kernel is not None:
            kernel.close()
    return Looked(seen, judge(seen, learned_home(seen, policy)), found)


async def with_neighbors(seen: Observation, deps: rounds.RoundDeps, paths: Paths) -> Observation:
    """Nameservers of the LAN that programs asked since the round are asked as well."""
    asked = {s.nameserver for s in seen.resolvers}
    fresh = [n for n in dns.besides(deps.nameservers(), deps.neighbors()) if dns.plain(n.address) not in asked]
    if not fresh:
        return seen
    found = (await dns.resolvers(paths, fresh)).sightings
    return replace(seen, resolvers=(*seen.resolvers, *(s for s in found if s.answer is Answer.ANSWERED)))
