"""All checks, run side by side, each within its own time."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from vpn_sentinel.agent.doctor import machine, network, places, reactions, server, tunnel
from vpn_sentinel.agent.doctor.check import Check, unknown
from vpn_sentinel.agent.doctor.forgiving import DoctorSettings
from vpn_sentinel.agent.doctor.ground import Ground, Once, greet_all, look
from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.http import Client, tls_context
from vpn_sentinel.agent.net.interfaces import Paths, Surveyor
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.runtime.clock import Clock

Look = Callable[[Ground], Awaitable[list[Check]]]
LIMIT: Final = 8.0  # seconds for one check, what it waits for included

# In the order in which they are shown. A new check is a function and its line here.
CHECKS: Final[tuple[tuple[str, Look], ...]] = (
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


# What this user's own traffic shows says nothing of the one user whom the tunnel is for.
_IN_THE_USERS_PLACE: Final = (
    network.routes, tunnel.way_out, tunnel.kill_switch, network.resolvers, network.system_resolver,
)  # fmt: skip


async def examine(read: DoctorSettings, clock: Clock) -> list[Check]:
    """Look at everything, within 10 seconds. Changes nothing here, and nothing on the server."""
    probes = read.agent.probes
    names = HostResolver()
    try:
        http = Client(names=names, tls=tls_context(probes.ca_file))
    except OSError:
        http = Client(names=names, tls=tls_context(None))
    with contextlib.ExitStack() as stack:
        kernel = _netlink()
        if kernel is not None:
            stack.callback(kernel.close)
        # As the agent looks: where the tunnel is for one user alone, in that user's place.
        around = Surveyor(kernel, configured=probes.tunnel_interface, only=probes.meant_outside.only).look()
        AS_USER.be(around.user)
        stack.callback(AS_USER.be, None)
        paths = Paths(kernel, around)
        async with asyncio.TaskGroup() as group:
            ground = Ground(
                read=read,
                clock=clock,
                kernel=kernel,
                survey=around,
                paths=paths,
                http=http,
                look=Once(group, look(read, http, around, paths)),
                greetings=Once(group, greet_all(read, http, clock)),
            )
            tasks = [group.create_task(_one(name, check, ground)) for name, check in CHECKS]
            await asyncio.wait(tasks)
            ground.look.stop()
            ground.greetings.stop()
    return [found for task in tasks for found in task.result()]


async def _one(name: str, check: Look, ground: Ground) -> list[Check]:
    if AS_USER.refused and check in _IN_THE_USERS_PLACE:
        return [unknown(name, "not asked: the tunnel is for one user alone, and not for this one")]
    try:
        async with asyncio.timeout(LIMIT):
            return await check(ground)
    except TimeoutError:
        return [unknown(name, f"could not be told within {LIMIT:g} s")]
    except OSError as e:
        return [unknown(name, f"could not be looked at: {e.strerror or e}")]


def _netlink() -> Netlink | None:
    try:
        return Netlink()
    except OSError:
        return None  # has a line of its own
