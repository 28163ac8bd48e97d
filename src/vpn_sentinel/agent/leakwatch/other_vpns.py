"""Which hosts carry other VPNs: a corporate VPN next to the tunnel also sends its packets by the physical interface.

WireGuard and OpenVPN have a fingerprint; OpenConnect, AnyConnect and SSTP look like any TLS. For those a trial is run,
as for the tunnel itself (`carrier`), whenever a packet goes to a host with a host route: what is sent into such a
device makes its program send to its server at once.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from vpn_sentinel.agent.leakwatch.carrier import Search, possible_ends, search
from vpn_sentinel.agent.net.endpoints import Endpoint
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.domain.policy import IPAddress

log = logging.getLogger(__name__)

RETRY_S: Final = 5.0  # from one trial of a device to the next one
_MAX_TRIED_DEVICES: Final = 4


class OtherVpns:
    """Runs no trial while no packet is in doubt."""

    def __init__(self, now: Callable[[], float], changed: Callable[[], None], search: Search = search) -> None:
        """`changed` is called after each trial, whatever its result."""
        self._now, self._changed, self.search = now, changed, search
        self._devices: tuple[Interface, ...] = ()
        self._hosts: tuple[IPAddress, ...] = ()
        self._outside_devices: tuple[str, ...] = ()
        self._found: dict[int, Endpoint] = {}
        self._tried: dict[int, float] = {}
        self._wake = asyncio.Event()

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where their packets were found to go."""
        return tuple(end for found in self._found.values() for end in possible_ends(found))

    @property
    def servers(self) -> tuple[IPAddress, ...]:
        return tuple(end.address for end in self._found.values())

    def update(
        self, devices: tuple[Interface, ...], hosts: tuple[IPAddress, ...], outside_devices: tuple[str, ...]
    ) -> None:
        """Take the present state: the devices, the hosts that may be a server, the interfaces outside the tunnel."""
        self._devices, self._hosts, self._outside_devices = devices[:_MAX_TRIED_DEVICES], hosts, outside_devices
        there = {i.index for i in self._devices}
        self._found = {i: end for i, end in self._found.items() if i in there and end.address in hosts}
        self._tried = {i: at for i, at in self._tried.items() if i in there}

    def doubts(self, to: IPAddress) -> bool:
        """Whether a packet to this address may be theirs, and a trial is possible now."""
        return to in self._hosts and bool(self._due())

    def doubt(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            await self.settle()

    async def settle(self) -> None:
        """Try each device that is due. Raises nothing."""
        self._wake.clear()
        for device in self._due():
            try:
                found = await self.search(device, self._hosts, self._outside_devices)
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
        return [d for d in self._devices if now - self._tried.get(d.index, float("-inf")) >= RETRY_S]
