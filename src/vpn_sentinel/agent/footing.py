"""What the agent and the reference agent both stand on: the spool, the way to the server, the kernel's events."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel import __version__
from vpn_sentinel.agent.endpoints import TCP
from vpn_sentinel.agent.equipment import http_client, open_kernel
from vpn_sentinel.agent.health import Health, Signs
from vpn_sentinel.agent.http import split
from vpn_sentinel.agent.interfaces import Survey
from vpn_sentinel.agent.names import Names, NotFoundError
from vpn_sentinel.agent.netlink import Netlink
from vpn_sentinel.agent.probes.targets import ServerEcho, Target
from vpn_sentinel.agent.rounds.state import RoundState
from vpn_sentinel.agent.rounds.triggers import TriggerQueue
from vpn_sentinel.agent.sensors.netlink import NetworkSensor
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.agent.spool import Spool, SpoolInUseError
from vpn_sentinel.agent.uplink.conversation import Destination, Routes
from vpn_sentinel.agent.uplink.courier import Courier
from vpn_sentinel.domain.policy import IPAddress, is_public
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

    async def run(self) -> None:
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

    def addresses(self) -> Iterator[IPAddress]:
        """All that are known of the server, whatever its echo is."""
        return (a for host in self.hosts for a in self.names.known(host))

    def _learn(self) -> None:
        if self._told is None:
            self.targets = ()
            return
        port, ident, key = self._told.port, bytes.fromhex(self._told.id), bytes.fromhex(self._told.key)
        # A server on the LAN or on this machine does not see where we leave for the internet.
        public = {a.version: a for a in reversed([*self.addresses()]) if is_public(a)}
        self.targets = tuple(ServerEcho(public[v], port, ident, key) for v in sorted(public))


class Base:
    """What the agent and the reference agent both stand on. Opened by the constructor, given back by `close`."""

    def __init__(self, settings: AgentSettings, clock: Clock) -> None:
        """Raises SettingError when a setting cannot be used."""
        need_key(settings)
        self.settings = settings
        self.clock = clock
        self.names = Names()
        self.http = http_client(settings.probes, self.names)
        self.spool = open_spool(settings, clock)
        self.kernel = open_kernel()
        self.echoes = Echoes(self.names, tuple(split(url).host for url in settings.urls))
        # Before all who put something in, or read it: nobody has to wait for somebody who is made later.
        self.triggers = TriggerQueue()
        self.rounds = RoundState(settings.probes.policy)

    def close(self) -> None:
        if self.kernel is not None:
            self.kernel.close()
        self.spool.close()


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


def health(base: Base, courier: Courier) -> Health:
    """The health endpoint of an agent that starts now."""
    started = base.clock.boottime()

    def signs() -> Signs:
        return Signs(started, base.rounds.last_success, courier.acked_at, base.rounds.state, base.spool.pending)

    return Health(signs, base.clock, base.settings.interval)


def watch_network(stack: contextlib.AsyncExitStack, changed: Callable[[], None], now: Survey) -> None:
    """Listen to the kernel until `stack` ends; a sandbox that forbids it leaves the timer and the pulses."""
    try:
        sensor = NetworkSensor(changed, now.interfaces or ())
    except OSError as e:
        log.warning("changes of the network are not told here", extra={"reason": e.strerror})
        return
    stack.callback(sensor.close)
    sensor.start()
