"""All checks, run concurrently, each with its own time limit."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from vpn_sentinel.agent.doctor import machine, network, places, reactions, server, tunnel
from vpn_sentinel.agent.doctor.check import Check, unknown
from vpn_sentinel.agent.doctor.context import DoctorContext, SharedTask, greet_all, observe
from vpn_sentinel.agent.doctor.lenient import DoctorSettings
from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.http import Client, tls_context
from vpn_sentinel.agent.net.interfaces import Paths, Surveyor
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.runtime.clock import Clock

CheckFunction = Callable[[DoctorContext], Awaitable[list[Check]]]
CHECK_TIMEOUT_S: Final = 8.0  # for one check, including what it waits for

# In the order of the output. A new check is a function and its line here.
CHECKS: Final[tuple[tuple[str, CheckFunction], ...]] = (
    ("settings", machine.settings),
    ("system", machine.system),
    ("capabilities", machine.capabilities),
    ("data folder", machine.data_folder),
    ("interfaces", network.interfaces),
    ("routes", network.routes),
    ("way out", tunnel.way_out),
    ("kill switch", tunnel.kill_switch),
    ("home addresses", tunnel.home),
    ("leak watch", tunnel.leak_watch),
    ("meant outside", tunnel.meant_outside),
    ("VPN program", tunnel.program),
    ("gluetun", tunnel.gluetun),
    ("resolvers", network.resolvers),
    ("system resolver", network.system_resolver),
    ("server", server.server),
    ("server addresses", server.addresses),
    ("pulse", server.echo),
    ("DNS zone", server.zone),
    ("clock", machine.clock),
    ("places", places.geo),
    ("containment", reactions.containment),
    ("remedies", reactions.remedies),
)


# These send packets or look up routes. Where the tunnel is for one user alone, the result for any other user says
# nothing about the tunnel.
_CHECKED_AS_TUNNEL_USER: Final = (
    network.routes, tunnel.way_out, tunnel.kill_switch, network.resolvers, network.system_resolver,
)  # fmt: skip


async def examine(settings: DoctorSettings, clock: Clock) -> list[Check]:
    """Run all checks, within 10 seconds. Changes nothing on this host or on the server."""
    probes = settings.agent.probes
    names = HostResolver()
    try:
        http = Client(names=names, tls=tls_context(probes.ca_file))
    except OSError:
        http = Client(names=names, tls=tls_context(None))
    with contextlib.ExitStack() as stack:
        kernel = _netlink()
        if kernel is not None:
            stack.callback(kernel.close)
        # As the agent does: where the tunnel is for one user alone, with sockets of that user.
        survey = Surveyor(kernel, configured=probes.tunnel_interface, only=probes.meant_outside.only_users).look()
        AS_USER.switch_to(survey.user)
        stack.callback(AS_USER.switch_to, None)
        paths = Paths(kernel, survey)
        async with asyncio.TaskGroup() as group:
            context = DoctorContext(
                settings=settings,
                clock=clock,
                kernel=kernel,
                survey=survey,
                paths=paths,
                http=http,
                observation=SharedTask(group, observe(settings, http, survey, paths)),
                greetings=SharedTask(group, greet_all(settings, http, clock)),
            )
            tasks = [group.create_task(_run(name, check, context)) for name, check in CHECKS]
            await asyncio.wait(tasks)
            context.observation.stop()
            context.greetings.stop()
    return [found for task in tasks for found in task.result()]


async def _run(name: str, check: CheckFunction, context: DoctorContext) -> list[Check]:
    if AS_USER.refused and check in _CHECKED_AS_TUNNEL_USER:
        return [unknown(name, "not checked: the tunnel is for one user alone, and not for this one")]
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await check(context)
    except TimeoutError:
        return [unknown(name, f"no result within {CHECK_TIMEOUT_S:g} s")]
    except OSError as e:
        return [unknown(name, f"could not be checked: {e.strerror or e}")]


def _netlink() -> Netlink | None:
    try:
        return Netlink()
    except OSError:
        return None  # the check of interfaces says so
