"""What the agent and the reference agent both stand on: the spool, the way to the server, the kernel's events."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel import __version__
from vpn_sentinel.agent.cycle import Cycle
from vpn_sentinel.agent.endpoints import TCP
from vpn_sentinel.agent.health import Health, Signs
from vpn_sentinel.agent.interfaces import Survey
from vpn_sentinel.agent.names import Names, NotFoundError
from vpn_sentinel.agent.netlink import Netlink
from vpn_sentinel.agent.probes.targets import ServerEcho, Target
from vpn_sentinel.agent.sensors.netlink import NetworkSensor
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.agent.spool import Spool, SpoolInUseError
from vpn_sentinel.agent.uplink.conversation import Destination, Routes
from vpn_sentinel.agent.uplink.courier import Courier
from vpn_sentinel.domain.observation import Observation
from vpn_sentinel.domain.policy import IPAddress, is_public
from vpn_sentinel.domain.verdict import Verdict
from vpn_sentinel.runtime import files
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError
from vpn_sentinel.wire.messages import PROTOCOL, Echo, Hello

log = logging.getLogger(__name__)

_SEEK_APART: Final = 60.0  # seconds


@dataclass(slots=True)
class Echoes:
    """The server's UDP echo, as its last Welcome told: one target for each family of its public addresses."""

    names: Names
    hosts: Sequence[str]
    targets: tuple[Target, ...] = ()
    _told: Echo | None = None
    _greeted: asyncio.Event = field(default_factory=asyncio.Event)

    def greet(self, echo: Echo | None) -> None:
        """A Welcome came."""
        self._told = echo
        self._learn()
        self._greeted.set()

    async def seek(self) -> None:
        """Look up the server's other names: where reports go over the LAN, nobody else asks for the public one's."""
        while True:
            await self._greeted.wait()
            self._greeted.clear()
            for host in self.hosts:
                if not self.names.known(host):
                    with contextlib.suppress(NotFoundError):  # the next greeting, or the next minute, tries again
                        await self.names.addresses(host)
            self._learn()
            if not all(self.names.known(host) for host in self.hosts):
                self._greeted.set()
            await asyncio.sleep(_SEEK_APART)

    def _learn(self) -> None:
        if self._told is None:
            self.targets = ()
            return
        port, ident, key = self._told.port, bytes.fromhex(self._told.id), bytes.fromhex(self._told.key)
        addresses = [a for host in self.hosts for a in self.names.known(host)]
        # A server on the LAN or on this machine does not see where we leave for the internet.
        public = {a.version: a for a in reversed(addresses) if is_public(a)}
        self.targets = tuple(ServerEcho(public[v], port, ident, key) for v in sorted(public))


class Repeats:
    """Tells a round that says what the one before it said: the spool may thin those."""

    def __init__(self) -> None:
        self._last: object = None

    def again(self, seen: Observation, verdict: Verdict) -> bool:
        said = (verdict.state, tuple(f.code for f in verdict.findings), seen.exit(4), seen.exit(6))
        before, self._last = self._last, said
        return said == before and not seen.actions

    def forget(self) -> None:
        """Something else was told meanwhile: the next round is no repetition."""
        self._last = None


def need_key(settings: AgentSettings) -> None:
    """Raises SettingError without a key for the server."""
    if not settings.api_key:
        raise SettingError(
            "VPN_SENTINEL_API_KEY", "is not set: on the server, `vpn-sentinel token create NAME` makes one"
        )


def open_spool(settings: AgentSettings, clock: Clock) -> Spool:
    """Raises SettingError when the data folder cannot be used, or another agent of this name uses it."""
    try:
        files.try_folder(settings.data_dir)
    except OSError as e:
        raise SettingError("VPN_SENTINEL_DATA_DIR", f"{settings.data_dir}: {e.strerror}") from e
    try:
        return Spool(settings.data_dir / f"agent-{settings.client_id}.sqlite", clock)
    except SpoolInUseError as e:
        raise SettingError("VPN_SENTINEL_DATA_DIR", str(e)) from e


def destination(settings: AgentSettings) -> Destination:
    """Where reports go, and how this agent introduces itself there; spool and time are filled in as it does."""
    return Destination(
        urls=settings.urls,
        api_path=settings.api_path,
        key=settings.api_key,
        allow_insecure=settings.allow_insecure,
        hello=Hello(
            protocol=PROTOCOL,
            client_id=settings.client_id,
            spool="",
            version=__version__,
            interval=settings.interval,
            wall=0.0,
            policy=settings.probes.policy,
            role=settings.role,
            site=settings.site,
        ),
    )


def way(kernel: Netlink | None, protocol: int) -> Callable[[IPAddress, int], object]:
    """A function that tells how the kernel routes there now: by which interface, and from which address."""

    def now(address: IPAddress, port: int) -> object:
        if kernel is None:
            return None
        try:
            route = kernel.route(address, port=port, protocol=protocol)
        except OSError:
            return None
        return route and (route.interface, route.source)

    return now


def routes(kernel: Netlink | None, look_around: Callable[[], Survey]) -> Routes:
    """What a conversation asks of the network here."""

    def owns(address: IPAddress) -> bool:
        return kernel is None or look_around().owns(address)

    return Routes(way=way(kernel, TCP), owns=owns)


def health(settings: AgentSettings, clock: Clock, cycle: Cycle, courier: Courier, spool: Spool) -> Health:
    """The health endpoint of an agent that starts now."""
    started = clock.boottime()

    def signs() -> Signs:
        state = cycle.verdict.state if cycle.verdict else None
        return Signs(started, cycle.last_success, courier.acked_at, state, spool.pending)

    return Health(signs, clock, settings.interval)


def watch_network(stack: contextlib.AsyncExitStack, changed: Callable[[], None], now: Survey) -> None:
    """Listen to the kernel until `stack` ends; a sandbox that forbids it leaves the timer and the pulses."""
    try:
        sensor = NetworkSensor(changed, now.interfaces or ())
    except OSError as e:
        log.warning("changes of the network are not told here", extra={"reason": e.strerror})
        return
    stack.callback(sensor.close)
    sensor.start()
