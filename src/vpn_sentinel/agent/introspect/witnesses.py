"""The sources about the tunnel besides the canaries, for a round and the leak watch."""

import asyncio
import logging
from collections.abc import Callable

from vpn_sentinel.agent.introspect.device import READ_EVERY_S, StallWatch
from vpn_sentinel.agent.introspect.gluetun import Gluetun
from vpn_sentinel.agent.introspect.openvpn import OpenVpn
from vpn_sentinel.agent.introspect.port import ForwardedPort
from vpn_sentinel.agent.introspect.settings import IntrospectSettings
from vpn_sentinel.agent.introspect.wireguard import Device, DeviceError, read_device
from vpn_sentinel.agent.net.endpoints import Endpoint
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.domain.observation import Claim
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)


class Witnesses:
    """`look` queries what is read for each round; `run` listens to the others."""

    def __init__(self, settings: IntrospectSettings, http: Client, clock: Clock, on_change: Callable[[], None]) -> None:
        """`on_change` is called when one of them reports a change."""
        self._clock = clock
        self._on_change = on_change
        self._tunnel: str | None = None
        self._wireguard: Device | None = None
        self._logged_refusal = False
        self._openvpn = OpenVpn(settings.openvpn, settings.openvpn_password, on_change) if settings.openvpn else None
        self._gluetun = Gluetun(http, settings.gluetun, settings.login, on_change) if settings.gluetun else None
        self._port = ForwardedPort(settings.forwarded_port)
        self._stalls = StallWatch(lambda: self._tunnel, on_change, clock)

    def endpoints(self) -> tuple[Endpoint, ...]:
        """All endpoints of the tunnel that are known, also after it went away: its last packets may come later."""
        peers = self._wireguard.peers if self._wireguard else ()
        known = [p.endpoint for p in peers if p.endpoint is not None]
        return tuple(dict.fromkeys((*known, *(self._openvpn.endpoints() if self._openvpn else ()))))

    def forwarded_port(self) -> int | None:
        """The configured port, else gluetun's."""
        self._port.read()
        return self._port.port or (self._gluetun.port if self._gluetun else None)

    async def look(self, survey: Survey) -> tuple[Claim, ...]:
        """The current claim of each, within half a second."""
        self._tunnel = survey.tunnel
        found = [await self._ask_wireguard(survey)]
        found += [witness.claim() for witness in (self._openvpn, self._gluetun) if witness is not None]
        return tuple(claim for claim in found if claim is not None)

    async def _ask_wireguard(self, survey: Survey) -> Claim | None:
        interface = next((i for i in survey.interfaces or () if i.name == survey.tunnel), None)
        if interface is None:
            return None
        try:
            device = await read_device(interface.name, kernel=interface.kind == "wireguard")
        except PermissionError:
            if not self._logged_refusal:
                log.info("no permission to read the state of WireGuard", extra={"interface": interface.name})
            self._logged_refusal = True
            return None
        except DeviceError as e:
            return Claim(source="wireguard", status=f"error: {e}")
        if device is None:
            return None
        self._wireguard = device
        return device.claim(self._clock.wall())

    async def run(self) -> None:
        """Listen; never returns."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._stalls.run())
            group.create_task(self._watch_port())
            for witness in (self._openvpn, self._gluetun):
                if witness is not None:
                    group.create_task(witness.run())

    async def _watch_port(self) -> None:
        self._port.read()
        while self._port.is_file:
            await asyncio.sleep(READ_EVERY_S)
            if self._port.read():
                self._on_change()
