"""The server's wiring: one long, boring function."""

import asyncio
import contextlib
import errno
import logging
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import httpx
from prometheus_client import CollectorRegistry
from sqlalchemy import insert, select, text, update

from vpn_sentinel import __version__
from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.runtime import files
from vpn_sentinel.runtime.clock import Clock, SteadyClock
from vpn_sentinel.runtime.settings import PREFIX, SettingError
from vpn_sentinel.server.access import Access, first_key
from vpn_sentinel.server.api.app import build_api
from vpn_sentinel.server.api.health import HealthServices, build_health
from vpn_sentinel.server.api.services import ApiServices
from vpn_sentinel.server.bot.bot import Bot
from vpn_sentinel.server.connection_limit import ConnectionMetrics
from vpn_sentinel.server.dashboard.app import DashboardServices, build_dashboard
from vpn_sentinel.server.dns_canary.listener import build_dns_canary
from vpn_sentinel.server.ingest.admission import Admission
from vpn_sentinel.server.ingest.keepalive import Keepalives
from vpn_sentinel.server.ingest.pulse import KnownTunnels, PulseMetrics, PulseProtocol, SightingQueue, names_of
from vpn_sentinel.server.ingest.pulse_registry import PulseRegistry
from vpn_sentinel.server.ingest.session import Sessions
from vpn_sentinel.server.ingest.switch import Switch
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.notify.channels import build_channels
from vpn_sentinel.server.notify.channels.bot_api import BotApi
from vpn_sentinel.server.notify.channels.moved_chats import MovedChats
from vpn_sentinel.server.notify.dispatcher import Dispatcher
from vpn_sentinel.server.notify.guard import tls
from vpn_sentinel.server.notify.metrics import NotifyMetrics
from vpn_sentinel.server.own_address import OwnAddress
from vpn_sentinel.server.serving import embedded, listen, serve_until
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.outbox_rows import delivery_rows
from vpn_sentinel.server.store.schema import meta, outbox
from vpn_sentinel.server.store.sqlite import SqliteStore
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.server.tracking.sites import Sites, Span
from vpn_sentinel.server.tracking.tracker import Tracker
from vpn_sentinel.server.watch.descriptors import Descriptors
from vpn_sentinel.server.watch.memory import give_back, spare_the_collector
from vpn_sentinel.server.watch.overdue import Overdue
from vpn_sentinel.server.watch.overload import Overload
from vpn_sentinel.server.watch.ports import Ports
from vpn_sentinel.server.watch.presence import Presence
from vpn_sentinel.server.watch.replicas import Replicas
from vpn_sentinel.server.watch.retention import Retention
from vpn_sentinel.server.watch.timekeeper import SETTLE_S, Timekeeper, database_time
from vpn_sentinel.server.watch.upkeep import Upkeep, UpkeepMetrics

log = logging.getLogger(__name__)

_FOLDER_WITHIN: Final = 5.0  # seconds; a dead NFS server's folder answers never
# Of a filesystem whose other end is away.
_AWAY: Final = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH)


@dataclass(frozen=True, slots=True)
class Sockets:
    """Bound before anything else starts, so that a busy port is told in one line and nothing has to be undone."""

    api: socket.socket
    echo: socket.socket
    health: socket.socket
    dashboard: socket.socket | None
    canary: tuple[socket.socket, ...] = ()

    @classmethod
    def bind(cls, settings: ServerSettings) -> "Sockets":
        """Raises SettingError that names the port or address that cannot be had."""
        bound: list[socket.socket] = []

        def take(host: str, port: int, name: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
            hosts = {"SERVER_API_PORT": "SERVER_HOST"}.get(name, name.replace("_PORT", "_HOST"))
            # The dashboard's address is no setting.
            host_setting = "" if name == "SERVER_DASHBOARD_PORT" else PREFIX + hosts
            bound.append(listen(host, port, PREFIX + name, kind, host_setting=host_setting))
            return bound[-1]

        try:
            api = take(settings.host, settings.api_port, "SERVER_API_PORT")
            echo = take(settings.host, settings.api_port, "SERVER_API_PORT", socket.SOCK_DGRAM)
            health = take(settings.health_host, settings.health_port, "SERVER_HEALTH_PORT")
            dashboard = None
            if settings.dashboard_enabled:
                dashboard = take(settings.dashboard_host, settings.dashboard_port, "SERVER_DASHBOARD_PORT")
            canary: tuple[socket.socket, ...] = ()
            if (zone := settings.canary) is not None:
                kinds = (socket.SOCK_DGRAM, socket.SOCK_STREAM)
                canary = tuple(take(host, zone.port, "CANARY_PORT", kind) for host in zone.hosts for kind in kinds)
        except BaseException:
            for sock in bound:
                sock.close()
            raise
        return cls(api, echo, health, dashboard, canary)

    def close(self) -> None:
        for sock in (self.api, self.echo, self.health, self.dashboard, *self.canary):
            if sock is not None:
                sock.close()


async def serve(
    settings: ServerSettings,
    clock: Clock,
    stop: asyncio.Event,
    tell: Callable[[str], None],
    *,
    started: Callable[[Store], None] = lambda _: None,
) -> None:
    """Run the server until `stop` is set. `tell` prints a line for whoever started it; `started` is called once it
    takes reports.

    Raises SettingError or StoreUnusable, with one line, when it cannot start.
    """
    await _try_backups(settings)
    sockets = Sockets.bind(settings)
    try:
        store = await open_store(settings.database_url, serving=True)
        try:
            await _run(settings, clock, stop, tell, store, sockets, started)
        finally:
            await store.close()
    finally:
        sockets.close()


async def _try_backups(settings: ServerSettings) -> None:
    """Raises SettingError for a folder of backups that is set and will not do, long before the first one is due.

    What may pass, as of a disk elsewhere that is away, is said when a backup is due: tunnels are watched all the same.
    """
    folder = settings.backup_dir
    if folder is None or settings.database_file is None or not settings.backup_hours:
        return
    try:
        await asyncio.wait_for(asyncio.to_thread(files.try_folder, folder), _FOLDER_WITHIN)
    except TimeoutError:
        log.warning("the folder of backups does not answer", extra={"folder": folder})
    except OSError as e:
        if e.errno not in _AWAY:
            raise SettingError(PREFIX + "BACKUP_DIR", f"{folder}: {e.strerror}") from e


async def _run(
    settings: ServerSettings,
    system: Clock,
    stop: asyncio.Event,
    tell: Callable[[str], None],
    store: Store,
    sockets: Sockets,
    started: Callable[[Store], None],
) -> None:
    clock = SteadyClock(system)
    alone = settings.database_url.startswith("sqlite:")
    keeper = Timekeeper(store, clock, lambda: _time(settings, system, store), patience=0.0 if alone else SETTLE_S)
    await keeper.start()
    secret = await _secret(store)
    if settings.api_key is None:
        await _first_key(store, clock, tell)

    registry = CollectorRegistry()
    hub = Hub()
    access = Access(store, clock, settings.api_key)
    trust = tls(settings.ca_file)
    timeouts = httpx.Timeout(15.0, connect=10.0, read=60.0)
    limits = httpx.Limits(max_connections=20)
    async with (
        # Never the process's proxy settings: they would carry what a VPN's owner wants kept apart.
        httpx.AsyncClient(verify=trust, timeout=timeouts, limits=limits, trust_env=False) as http,
        asyncio.TaskGroup() as tasks,
    ):
        moved_chats = MovedChats(store)
        bot_api = BotApi(http, settings.telegram, clock, moved=moved_chats) if settings.telegram else None
        if settings.telegram is not None:
            await moved_chats.load(settings.telegram.chat_id)
        channels = build_channels(settings, http, clock=clock, api=bot_api)
        dispatcher = Dispatcher(store, channels, clock, NotifyMetrics(registry, channels))
        own_address = OwnAddress(http, settings.trace_url, _wants_own_address(settings))
        sites = Sites(lambda name: _pulsed(pulse_registry, name, clock), moved=lambda: keeper.moved)
        await sites.load(store, clock.wall())
        tracker = Tracker(
            store,
            clock,
            hub,
            settings.policy,
            channels=tuple(channels),
            on_commit=dispatcher.wake,
            own_address=own_address,
            sites=sites,
            moved=lambda: keeper.moved,
        )
        ports = Ports(tracker.forwarded if settings.port_check else {}, tracker.submit, clock)
        admission = Admission(settings, access, clock)
        sighting_queue = SightingQueue(tracker.submit, clock.wall)
        pulse_registry = PulseRegistry(secret, sighting_queue.note)
        known = KnownTunnels(pulse_registry, lambda: _names(store, clock))
        pulses = PulseProtocol(pulse_registry, clock.boottime, missed=known.missed)
        PulseMetrics(registry, lambda: pulses.counts)
        sessions = Sessions(
            tracker,
            store,
            clock,
            echo_secret=secret,
            echo_port=settings.api_port,
            missed=settings.missed_reports,
            canary_zone=settings.canary.zone if settings.canary else None,
            pulse_registry=pulse_registry,
        )
        keepalives = Keepalives(admission, tracker, clock, settings.keepalive_timeout)
        services = ApiServices(store=store, access=access, hub=hub, settings=settings, clock=clock)
        per_client = 10 * settings.rate_limit
        api = Switch(admission, keepalives, sessions, build_api(services), settings.api_path, per_client=per_client)
        dns_canary = build_dns_canary(settings.canary, secret, own_address, registry) if settings.canary else None
        presence = Presence(clock)
        overdue = Overdue(store, tracker, clock, presence, keeper.follow)
        overload = Overload(store, tuple(channels), clock, presence, registry, dispatcher.wake)
        health = build_health(
            HealthServices(
                store=store,
                clock=clock,
                registry=registry,
                dispatcher=dispatcher.healthy,
                deadlines=overdue.healthy,
                dns_canary=dns_canary.healthy if dns_canary else None,
            )
        )

        running = [
            tasks.create_task(tracker.run(), name="tracker"),
            tasks.create_task(dispatcher.run(), name="dispatcher"),
            tasks.create_task(presence.run(), name="presence"),
            tasks.create_task(overdue.run(), name="overdue"),
            tasks.create_task(overload.run(), name="overload"),
            tasks.create_task(Descriptors(clock, registry).run(), name="descriptors"),
            tasks.create_task(give_back(), name="memory"),
            tasks.create_task(Retention(store, clock, settings.retention_days).run(), name="retention"),
            tasks.create_task(own_address.run(), name="own address"),
            tasks.create_task(sites.run(store, clock), name="sites"),
            tasks.create_task(ports.run(), name="ports"),
            tasks.create_task(known.run(), name="names of pulses"),
            tasks.create_task(sighting_queue.run(), name="sightings"),
        ]
        engine_needs = _what_its_engine_needs(settings, store, hub, clock, dispatcher, registry)
        running.append(tasks.create_task(engine_needs.run(), name="engine"))
        if settings.telegram is not None and bot_api is not None:
            bot = Bot(bot_api, store, clock, settings.telegram.chat_id, secrets.token_hex(8))
            running.append(tasks.create_task(bot.run(), name="bot"))

        loop = asyncio.get_running_loop()
        echo, _ = await loop.create_datagram_endpoint(lambda: pulses, sock=sockets.echo)
        if dns_canary is not None:
            await dns_canary.open(sockets.canary)
        closing = asyncio.Event()
        cert, key_file = settings.tls_cert, settings.tls_key
        listeners = {"api": (embedded(api, cert=cert, key=key_file), sockets.api)}
        listeners["health"] = (embedded(health, side=True), sockets.health)
        if sockets.dashboard is not None:
            dashboard = build_dashboard(DashboardServices(store=store, hub=hub, settings=settings, clock=clock))
            listeners["dashboard"] = (embedded(dashboard, side=True), sockets.dashboard)
        connection_limits = {name: server.connection_limit for name, (server, _) in listeners.items()}
        ConnectionMetrics(registry, connection_limits | ({"canary": dns_canary.connection_limit} if dns_canary else {}))
        servers = [tasks.create_task(serve_until(server, bound, closing)) for server, bound in listeners.values()]

        at = clock.wall()
        started_notice = Notice(kind=Kind.SERVER_STARTED, at=at, details=(f"Version {__version__}",))
        if settings.database_url.startswith("sqlite:"):
            # Nobody else delivers from this file: a lease that stands is a crashed server's, and need not run out.
            await store.write(update(outbox).where(outbox.c.settled_at.is_(None)).values(leased_until=0.0))
        if deliveries := delivery_rows(started_notice, channels, at):
            await store.write(insert(outbox).values(deliveries))
        dispatcher.wake()
        log.info("server started", extra={"version": __version__, "port": settings.api_port})
        started(store)
        spare_the_collector()
        await stop.wait()

        hub.close()
        closing.set()
        await asyncio.gather(*servers)
        echo.close()
        if dns_canary is not None:
            dns_canary.close()
        for task in running:
            task.cancel()
    log.info("server stopped")


def _what_its_engine_needs(
    settings: ServerSettings, store: Store, hub: Hub, clock: Clock, dispatcher: Dispatcher, registry: CollectorRegistry
) -> Upkeep | Replicas:
    """A SQLite file is nobody else's to look after; a PostgreSQL database may be other servers' too."""
    folder = settings.backup_folder
    if isinstance(store, SqliteStore) and folder is not None:
        return Upkeep(
            store,
            clock,
            dispatcher.channels,
            dispatcher.wake,
            UpkeepMetrics(registry),
            folder=folder,
            hours=settings.backup_hours,
            keep=settings.backup_keep,
        )
    return Replicas(store, hub, clock)


def _wants_own_address(settings: ServerSettings) -> tuple[str, ...]:
    """What does not work while the server's own public address is unknown, and what to set then."""
    wanted = []
    if not settings.policy.home_networks:
        wanted.append(
            "old clients (bare keepalives) cannot be told from home yet: this server's public address, taken for "
            "their home, could not be asked; VPN_SENTINEL_HOME_NETWORKS says it for good"
        )
    if settings.canary is not None and not settings.canary.addresses:
        wanted.append(
            "the canary zone's nameserver has no address yet: this server's public one could not be asked; "
            "VPN_SENTINEL_CANARY_ADDRESSES says it for good"
        )
    return tuple(wanted)


async def _time(settings: ServerSettings, system: Clock, store: Store) -> float:
    """By the clock that all who write into the database have in common."""
    return system.wall() if settings.database_url.startswith("sqlite:") else await database_time(store)


async def _names(store: Store, clock: Clock) -> dict[str, float]:
    """Of each tunnel that may pulse, when it reported last, by the boot time's clock."""
    offset = clock.wall() - clock.boottime()
    return {name: at - offset for name, at in (await names_of(store)).items()}


def _pulsed(pulse_registry: PulseRegistry, name: str, clock: Clock) -> Span | None:
    """From when to when pulses of `name` came over the internet without a gap, by the wall clock."""
    offset = clock.wall() - clock.boottime()
    span = pulse_registry.steady(name)
    return None if span is None else (span[0] + offset, span[1] + offset)


async def _first_key(store: Store, clock: Clock, tell: Callable[[str], None]) -> None:
    """Make the installation's first shared key, where there never was one, and print it."""

    def show(key: str) -> None:
        with contextlib.suppress(OSError):  # a full disk behind standard output; the log tells what to do
            tell(f"A first key was made. It is shown only now; agents send it as VPN_SENTINEL_API_KEY:\n\n    {key}\n")

    if await first_key(store, clock.wall(), show):
        another = "vpn-sentinel token create NAME --shared"
        log.info("a first key was made and printed, once; if nobody saw it, make another", extra={"by": another})


async def _secret(store: Store) -> bytes:
    """The installation's own 32 bytes, made once: keys of the UDP echo come from it."""
    asked = select(meta.c.value).where(meta.c.key == "secret")
    if not (found := await store.read(asked)):
        # Two replicas may start at once: whoever comes second takes the first one's.
        add = text("INSERT INTO meta (key, value) VALUES ('secret', :made) ON CONFLICT (key) DO NOTHING")
        await store.write(add.bindparams(made=secrets.token_hex(32)))
        found = await store.read(asked)
    return bytes.fromhex(found[0].value)
