"""One packet to each part of the internet that routes send past the tunnel: does it really leave there?

Its TTL is 1, so that no host beyond the first router sees it; the router's time-exceeded message, or this host's
refusal to send, is the answer. Takes at most 0.6 s, in parallel with the canaries.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from vpn_sentinel.agent.net.roles import INTERNET
from vpn_sentinel.agent.probes.datagram import TRACEROUTE_PORT, DatagramResult, DatagramTarget, ask
from vpn_sentinel.domain.observation import Routed
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, is_public

MAX_TRIED: Final = 6  # parts of the internet tried in one round
_ROUTER_TIMEOUT_S: Final = 0.6
# This host's refusal comes at once, and nothing else shows that a packet is blocked: where a router stays silent, the
# result is what the routes say.
_REFUSAL_TIMEOUT_S: Final = 0.05


class BypassProbes:
    """One packet into each of the first parts beside the tunnel, sent by tasks of `group`."""

    def __init__(self, group: asyncio.TaskGroup, parts: tuple[Routed, ...], tunnel: str | None) -> None:
        self._parts = parts
        beside = [p for p in parts if p.interface != tunnel and p.networks][:MAX_TRIED]
        self._tasks = {id(part): group.create_task(_try(part)) for part in beside}

    async def results(self, enough: Callable[[tuple[Routed, ...]], bool]) -> tuple[Routed, ...]:
        """The same parts, with the answers of those that were tried.

        Waits for all answers, or until `enough` is true.
        """
        waiting: set[asyncio.Task[Routed]] = set(self._tasks.values())
        if waiting:
            _, waiting = await asyncio.wait(waiting, timeout=_REFUSAL_TIMEOUT_S)
        while waiting and not enough(self._so_far()):
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        found = self._so_far()
        self.stop()
        return found

    def _so_far(self) -> tuple[Routed, ...]:
        tasks = [(part, self._tasks.get(id(part))) for part in self._parts]
        return tuple(task.result() if task is not None and task.done() else part for part, task in tasks)

    def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()


async def _try(part: Routed) -> Routed:
    address = _within(part.networks[0])
    where = DatagramTarget(address=address, port=TRACEROUTE_PORT, hops=1)
    outcome: DatagramResult[None] = await ask(where, b"\0" * 8, lambda _: None, limit=_ROUTER_TIMEOUT_S, resend=None)
    return replace(part, asked=address, answer=outcome.answer)


def _within(network: IPNetwork) -> IPAddress:
    """An address of the network: itself when it is a single one, else the first that can be a host's.

    No host has 0.0.0.1 or ::1, which the widest networks begin with.
    """
    first = network.network_address + (0 if network.prefixlen == network.max_prefixlen else 1)
    return first if is_public(first) else next((a for a in INTERNET if a in network), first)
