"""The agent put together: one long function, one task group."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel import __version__
from vpn_sentinel.agent import round as rounds
from vpn_sentinel.agent.cycle import Cycle
from vpn_sentinel.agent.health import Health, Signs
from vpn_sentinel.agent.http import Client, split, tls_context
from vpn_sentinel.agent.interfaces import Paths, Survey, survey
from vpn_sentinel.agent.names import Names
from vpn_sentinel.agent.netlink import Netlink
from vpn_sentinel.agent.probes import dns, mmdb
from vpn_sentinel.agent.probes.canary import Flock
from vpn_sentinel.agent.probes.place import Places
from vpn_sentinel.agent.probes.placing import Service, services
from vpn_sentinel.agent.probes.targets import CLOUDFLARE, OPENDNS, ServerEcho, Target, address_in
from vpn_sentinel.agent.probes.trace import trace
from vpn_sentinel.agent.sensors.beat import Beat
from vpn_sentinel.agent.sensors.netlink import NetworkSensor
from vpn_sentinel.agent.settings import AgentSettings, ProbeSettings
from vpn_sentinel.agent.spool import Spool, SpoolInUseError
from vpn_sentinel.agent.uplink.conversation import Destination, Ground
from vpn_sentinel.agent.uplink.courier import Courier
from vpn_sentinel.domain.observation import Observation, Path, Trigger
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.domain.verdict import Verdict
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError
from vpn_sentinel.wire import codec
from vpn_sentinel.wire.messages import PROTOCOL, Echo, Hello

log = logging.getLogger(__name__)

TCP: Final = 6


@dataclass(slots=True)
class Echoes:
    """The server's UDP echo, as its last Welcome told: one target for each family of its public addresses."""

    targets: tuple[Target, ...] = field(default=())

    def learn(self, echo: Echo | None, addresses: tuple[IPAddress, ...]) -> None:
        if echo is None:
            self.targets = ()
            return
        ident, key = bytes.fromhex(echo.id), bytes.fromhex(echo.key)
        # A server on the LAN or on this machine does not see where we leave for the internet.
        public = {a.version: a for a in reversed(addresses) if a.is_global}
        self.targets = tuple(ServerEcho(public[v], echo.port, ident, key) for v in sorted(public))


def open_kernel() -> Netlink | None:
    try:
        return Netlink()
    except OSError as e:
        log.warning("no netlink here: interfaces and paths stay unknown", extra={"reason": e.strerror})
        return None


def http_client(settings: ProbeSettings, names: Names) -> Client:
    """Raises SettingError when the CA file holds no certificates."""
    try:
        return Client(names=names, tls=tls_context(settings.ca_file))
    except OSError as e:
        raise SettingError("VPN_SENTINEL_CA_FILE", f"{settings.ca_file} holds no usable certificates") from e


def chosen_services(settings: ProbeSettings) -> tuple[Service, ...]:
    """All, or the one that is configured; Cloudflare's trace is asked for the exit in any case."""
    found = services(settings.ipinfo_url, settings.ipapi_url, settings.ipwhois_url, settings.trace_url)
    chosen = settings.geolocation_service
    return found if chosen == "auto" else tuple(s for s in found if s.name in (chosen, "cloudflare"))


def open_databases(settings: ProbeSettings) -> tuple[tuple[str, mmdb.Reader], ...]:
    try:
        return mmdb.open_databases(settings.databases)
    except ValueError as e:
        raise SettingError("VPN_SENTINEL_GEO_DB", str(e)) from e


def flock(settings: ProbeSettings, http: Client, echoes: tuple[Target, ...], paths: Paths) -> Flock:
    """Who is asked in a round: the server's echo and Cloudflare, then OpenDNS, then Cloudflare over HTTPS."""
    path = path_to(settings.trace_url, paths)
    # A nameserver in use is judged as one: what escapes to it is a DNS leak, and says nothing of other traffic.
    nameservers = {server.address for server in dns.system_nameservers()}
    usual, reserve = (tuple(t for t in some if t.address not in nameservers) for some in (CLOUDFLARE, OPENDNS))
    if len(usual) < len(CLOUDFLARE):
        usual, reserve = (*usual, *reserve), ()
    return Flock(targets=(*echoes, *usual), reserve=reserve, others=(lambda: trace(http, settings.trace_url, path),))


def path_to(url: str, paths: Paths) -> Path:
    """How the kernel would route a request to `url`; unknown for a name, whose address is not known yet."""
    where = split(url)
    address = address_in(where.host)
    return Path.UNKNOWN if address is None else paths.of(address, where.port, TCP)


def watch_network(stack: contextlib.AsyncExitStack, changed: Callable[[], None], now: Survey) -> None:
    """Listen to the kernel until `stack` ends; a sandbox that forbids it leaves the timer and the beat."""
    try:
        sensor = NetworkSensor(changed, now.interfaces or ())
    except OSError as e:
        log.warning("changes of the network are not told here", extra={"reason": e.strerror})
        return
    stack.callback(sensor.close)
    sensor.start()


async def run(settings: AgentSettings, clock: Clock, stop: asyncio.Event) -> None:  # noqa: C901 - wiring
    """Run the agent until `stop` is set. Raises SettingError when it cannot start."""
    if not settings.api_key:
        raise SettingError(
            "VPN_SENTINEL_API_KEY", "is not set: on the server, `vpn-sentinel token create NAME` makes one"
        )
    probes = settings.probes
    started = clock.boottime()
    names = Names()
    http = http_client(probes, names)
    databases = open_databases(probes)
    try:
        spool = Spool(settings.data_dir / f"agent-{settings.client_id}.sqlite", clock)
    except SpoolInUseError as e:
        raise SettingError("VPN_SENTINEL_DATA_DIR", str(e)) from e
    kernel = open_kernel()
    echoes = Echoes()
    places = Places(http, chosen_services(probes), clock, databases=databases, limit=min(probes.timeout, 5.0))

    def look_around() -> Survey:
        found = survey(kernel, configured=probes.tunnel_interface, remembered=spool.fact("tunnel"))
        if found.tunnel is not None:
            spool.keep("tunnel", found.tunnel)
        return found

    eyes = rounds.Eyes(
        kernel=kernel,
        survey=look_around,
        flock=lambda paths: flock(probes, http, echoes.targets, paths),
        places=places,
        clock=clock,
    )

    def way(address: IPAddress, port: int) -> object:
        if kernel is None:
            return None
        try:
            route = kernel.route(address, port=port, protocol=TCP)
        except OSError:
            return None
        return route and (route.interface, route.source)

    def owns(address: IPAddress) -> bool:
        return kernel is None or look_around().owns(address)

    def greeted(echo: Echo | None) -> None:
        hosts = [split(url).host for url in settings.urls]
        echoes.learn(echo, tuple(a for host in hosts for a in names.known(host)))

    courier = Courier(
        Destination(
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
                policy=probes.policy,
            ),
        ),
        spool,
        http,
        clock,
        ground=Ground(way=way, owns=owns),
        greeted=greeted,
    )
    marks: list[object] = [None]

    def done(seen: Observation, verdict: Verdict) -> None:
        mark = (verdict.state, tuple(f.code for f in verdict.findings), seen.exit(4), seen.exit(6))
        spool.append(codec.encode(seen), routine=mark == marks[0])
        marks[0] = mark
        beat.saw(seen)
        courier.wake()

    cycle = Cycle(
        lambda trigger, policy: rounds.look(eyes, trigger, policy),
        done,
        policy=probes.policy,
        interval=settings.interval,
        clock=clock,
    )

    def network_changed() -> None:
        courier.kick()
        cycle.bell.ring(Trigger.NETWORK)

    def beat_changed() -> None:
        courier.kick()
        cycle.bell.ring(Trigger.CANARY)

    beat = Beat(settings.pulse, echoes=lambda: echoes.targets, ring=beat_changed)
    health = Health(
        lambda: Signs(
            started,
            cycle.last_success,
            courier.acked_at,
            cycle.verdict.state if cycle.verdict else None,
            spool.pending,
        ),
        clock,
        settings.interval,
    )
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        stack.callback(spool.close)
        if kernel is not None:
            stack.callback(kernel.close)
            watch_network(stack, network_changed, look_around())
        server = await health.serve(settings.health_host, settings.health_port)
        stack.callback(server.close)
        log.info("agent started", extra={"client_id": settings.client_id, "version": __version__})
        tasks = [group.create_task(work) for work in (cycle.run(), beat.run(), courier.run())]
        await stop.wait()
        for task in tasks:
            task.cancel()
    log.info("agent stopped")
