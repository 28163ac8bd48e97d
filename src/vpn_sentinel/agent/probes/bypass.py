"""One packet into each part of the internet that routes send past the tunnel: does it really leave there?

It has one hop to live, so that nobody beyond the first router sees it; that router's time-exceeded, or this host's
refusal to send, is the answer. Costs at most a second, beside the canaries.
"""

import asyncio
from dataclasses import replace
from typing import Final

from vpn_sentinel.agent.probes.datagram import Destination, Outcome, ask
from vpn_sentinel.domain.observation import Routed
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

MAX_TRIED: Final = 6  # parts that are tried in one round
_TRACEROUTE: Final = 33434  # the port that traceroute(8) begins with: no service listens there


async def tried(parts: tuple[Routed, ...], tunnel: str | None) -> tuple[Routed, ...]:
    """The same parts; of those beside the tunnel the first few say how a packet into them ended."""
    beside = [p for p in parts if p.interface != tunnel and p.networks][:MAX_TRIED]
    async with asyncio.TaskGroup() as group:
        tasks = {id(part): group.create_task(_try(part)) for part in beside}
    return tuple(tasks[id(p)].result() if id(p) in tasks else p for p in parts)


async def _try(part: Routed) -> Routed:
    address = _within(part.networks[0])
    where = Destination(address=address, port=_TRACEROUTE, hops=1)
    outcome: Outcome[None] = await ask(where, b"\0" * 8, lambda _: None, limit=0.6, resend=None)
    return replace(part, asked=address, answer=outcome.answer)


def _within(network: IPNetwork) -> IPAddress:
    """An address of the network: itself when it is a single one, else the first that can be a host's."""
    return network.network_address + (0 if network.prefixlen == network.max_prefixlen else 1)
