"""What carries other VPNs' devices: a corporate VPN beside the tunnel sends its own packets by the uplink as well.

WireGuard and OpenVPN are known by their shape, and what looks like anybody's TLS is not: OpenConnect, AnyConnect, SSTP.
As for the tunnel itself (`carrier`) it is tried, whenever a packet goes to a single host with a route of its own: what
is sent into such a device makes its program send to its server at once.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from vpn_sentinel.agent.leakwatch.carrier import Search, search, twins
from vpn_sentinel.agent.net.endpoints import Endpoint
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.domain.policy import IPAddress

log = logging.getLogger(__name__)

AGAIN_S: Final = 5.0  # seconds from one trial of a device to the next one
_MAX_DEVICES: Final = 4  # devices that are tried


class Others:
    """Nothing is tried while no packet is in doubt."""

    def __init__(self, now: Callable[[], float], changed: Callable[[], None], search: Search = search) -> None:
        """`changed` is called after each trial, whatever it showed."""
        self._now, self._changed, self.search = now, changed, search
        self._devices: tuple[Interface, ...] = ()
        self._hosts: tuple[IPAddress, ...] = ()
        self._ways: tuple[str, ...] = ()
        self._found: dict[int, Endpoint] = {}
        self._tried: dict[int, float] = {}
        self._wake = asyncio.Event()

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where their packets were found to go."""
        return tuple(end for found in self._found.values() for end in twins(found))

    @property
    def servers(self) -> tuple[IPAddress, ...]:
        return tuple(end.address for end in self._found.values())

    def look(self, devices: tuple[Interface, ...], hosts: tuple[IPAddress, ...], ways: tuple[str, ...]) -> None:
        """What is there now: the devices, the hosts that may be one's server, and the ways beside the tunnel."""
        self._devices, self._hosts, self._ways = devices[:_MAX_DEVICES], hosts, ways
        there = {i.index for i in self._devices}
        self._found = {i: end for i, end in self._found.items() if i in there and end.address in hosts}
        self._tried = {i: at for i, at in self._tried.items() if i in there}

    def doubts(self, to: IPAddress) -> bool:
        """Whether what goes to this address may be theirs, and a trial would tell."""
        return to in self._hosts and bool(self._due())

    def doubt(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            await self.settle()

    async def settle(self) -> None:
        """Try each device whose time it is. Raises nothing."""
        self._wake.clear()
        for device in self._due():
            try:
                found = await self.search(device, self._hosts, self._ways)
            except (OSError, ValueError) as e:
                log.info("what carries another VPN cannot be tried", extra={"device": device.name, "reason": str(e)})
                found = None
            self._tried[device.index] = self._now()
            if found is None:
                self._found.pop(device.index, None)
            elif self._found.get(device.index) != found:
                self._found[device.index] = found
                log.info("another VPN is known by its packets", extra={"device": device.name, "endpoint": str(found)})
        self._changed()

    def _due(self) -> list[Interface]:
        now = self._now()
        return [d for d in self._devices if now - self._tried.get(d.index, float("-inf")) >= AGAIN_S]
