"""What agent and reference agent share: the spool, the uplink's settings, the kernel's events."""

import contextlib
import logging
from collections.abc import Callable

from vpn_sentinel import __version__
from vpn_sentinel.agent.build import http_client, open_kernel
from vpn_sentinel.agent.health import Health, HealthFacts
from vpn_sentinel.agent.net.endpoints import TCP
from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.net.urls import split
from vpn_sentinel.agent.probes.echoes import Echoes
from vpn_sentinel.agent.rounds.state import RoundState
from vpn_sentinel.agent.rounds.triggers import TriggerQueue
from vpn_sentinel.agent.sensors.netlink import NetworkSensor
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.agent.spool.spool import Spool, SpoolInUseError
from vpn_sentinel.agent.uplink.connection import ReportTarget, Routes
from vpn_sentinel.agent.uplink.uploader import Uploader
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime import files
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError
from vpn_sentinel.wire.messages import PROTOCOL, Hello

log = logging.getLogger(__name__)


class Base:
    """What agent and reference agent share. Opened by the constructor, closed by `close`."""

    def __init__(self, settings: AgentSettings, clock: Clock) -> None:
        """Raises SettingError when a setting cannot be used."""
        need_key(settings)
        self.settings = settings
        self.clock = clock
        self.names = HostResolver()
        self.http = http_client(settings.probes, self.names)
        self.spool = open_spool(settings, clock)
        self.kernel = open_kernel()
        self.echoes = Echoes(self.names, tuple(split(url).host for url in settings.urls))
        # Made before the parts that write and read them, so that no part refers to one that is made later.
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


def report_target(settings: AgentSettings) -> ReportTarget:
    """Where reports go, and how this agent introduces itself; the connection fills in spool and time."""
    return ReportTarget(
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


def route_lookup(kernel: Netlink | None, protocol: int) -> Callable[[IPAddress, int], object]:
    """A function that returns how the kernel routes to an address and port now: the interface and the source
    address.
    """

    def now(address: IPAddress, port: int) -> object:
        if kernel is None:
            return None
        try:
            route = kernel.route(address, port=port, protocol=protocol)
        except OSError:
            return None
        return route and (route.interface, route.source)

    return now


def uplink_routes(kernel: Netlink | None, survey_now: Callable[[], Survey]) -> Routes:
    """The lookups that a connection of the uplink needs."""

    def owns(address: IPAddress) -> bool:
        return kernel is None or survey_now().owns(address)

    return Routes(route_to=route_lookup(kernel, TCP), owns=owns)


def health(base: Base, uploader: Uploader) -> Health:
    """The health endpoint of an agent that starts now."""
    started = base.clock.boottime()

    def health_facts() -> HealthFacts:
        return HealthFacts(started, base.rounds.last_success, uploader.acked_at, base.rounds.state, base.spool.pending)

    return Health(health_facts, base.clock, base.settings.interval)


def watch_network(stack: contextlib.AsyncExitStack, changed: Callable[[], None], now: Survey) -> None:
    """Listen to the kernel until `stack` ends; in a sandbox that forbids it, timer and pulses remain."""
    try:
        sensor = NetworkSensor(changed, now.interfaces or ())
    except OSError as e:
        log.warning("the kernel does not report changes of the network here", extra={"reason": e.strerror})
        return
    stack.callback(sensor.close)
    sensor.start()
