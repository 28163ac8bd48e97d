"""The wiring of the server: each part is made from those before it."""

import asyncio
import contextlib
import errno
import logging
import secrets
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

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
from vpn_sentinel.server.bound_sockets import BoundSockets
from vpn_sentinel.server.connection_limit import ConnectionMetrics
from vpn_sentinel.server.dashboard.app import DashboardServices, build_dashboard
from vpn_sentinel.server.dns_canary.listener import DnsListener, build_dns_canary
from vpn_sentinel.server.ingest.admission import Admission
from vpn_sentinel.server.ingest.keepalive import Keepalives
from vpn_sentinel.server.ingest.pulse import KnownTunnels, PulseMetrics, PulseProtocol, PulseQueue, known_names
from vpn_sentinel.server.ingest.pulse_registry import PulseRegistry
from vpn_sentinel.server.ingest.router import ReportRouter
from vpn_sentinel.server.ingest.session import Sessions
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.notify.channels import build_channels
from vpn_sentinel.server.notify.channels.bot_api import BotApi
from vpn_sentinel.server.notify.channels.moved_chats import MovedChats
from vpn_sentinel.server.notify.dispatcher import Dispatcher
from vpn_sentinel.server.notify.guard import tls
from vpn_sentinel.server.notify.metrics import NotifyMetrics
from vpn_sentinel.server.own_address import OwnAddress
from vpn_sentinel.server.serving import EmbeddedServer, embedded, serve_until
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.outbox_rows import delivery_rows
from vpn_sentinel.server.store.schema import meta, outbox
from vpn_sentinel.server.store.sqlite import SqliteStore
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.server.tracking.sites import Sites, Span
from vpn_sentinel.server.tracking.tracker import Tracker
from vpn_sentinel.server.watch.descriptors import Descriptors
from vpn_sentinel.server.watch.memory import freeze_gc, trim_heap
from vpn_sentinel.server.watch.overdue import Overdue
from vpn_sentinel.server.watch.overload import Overload
from vpn_sentinel.server.watch.ports import PortChecker
from vpn_sentinel.server.watch.presence import Presence
from vpn_sentinel.server.watch.replicas import ReplicaPoller
from vpn_sentinel.server.watch.retention import Retention
from vpn_sentinel.server.watch.timekeeper import SETTLE_S, Timekeeper, database_time
from vpn_sentinel.server.watch.upkeep import Upkeep, UpkeepMetrics

log = logging.getLogger(__name__)

_FOLDER_TIMEOUT_S: Final = 5.0  # a folder of a dead NFS server never answers
# Errors of a network filesystem whose server cannot be reached.
_UNAVAILABLE_ERRNOS: Final = (
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
)


async def serve(
    settings: ServerSettings,
    clock: Clock,
    stop: asyncio.Event,
    print_line: Callable[[str], None],
    *,
    started: Callable[[Store], None] = lambda _: None,
) -> None:
    """Run the server until `stop` is set. `print_line` prints a line for the user who started it; `started` is called
    once the server accepts reports.

    Raises SettingError or StoreUnusable, with one line, when it cannot start.
    """
    await _try_backups(settings)
    sockets = BoundSockets.bind(settings)
    try:
        store = await open_store(settings.database_url, serving=True)
        try:
            await _run(settings, clock, stop, print_line, store, sockets, started)
        finally:
            await store.close()
    finally:
        sockets.close()


async def _try_backups(settings: ServerSettings) -> None:
    """Raises SettingError for a folder of backups that cannot be used, long before the first backup is due.

    A failure that may be temporary, such as a network disk that is away, is only logged when a backup is due: tunnels
    are watched all the same.
    """
    folder = settings.backup_dir
    if folder is None or settings.database_file is None or not settings.backup_hours:
        return
    try:
        await asyncio.wait_for(asyncio.to_thread(files.try_folder, folder), _FOLDER_TIMEOUT_S)
    except TimeoutError:
        log.warning("the folder of backups does not answer", extra={"folder": folder})
    except OSError as e:
        if e.errno not in _UNAVAILABLE_ERRNOS:
            raise SettingError(PREFIX + "BACKUP_DIR", f"{folder}: {e.strerror}") from e


@dataclass(frozen=True, slots=True, kw_only=True)
class _ServerBase:
    """What every part needs. `http` is for the server's own requests."""

    settings: ServerSettings
    store: Store
    clock: SteadyClock
    keeper: Timekeeper
    secret: bytes
    registry: CollectorRegistry
    hub: Hub
    access: Access
    http: httpx.AsyncClient


@dataclass(frozen=True, slots=True, kw_only=True)
class _Notifying:
    """What notifies people. `bot` answers them, where Telegram is set up."""

    dispatcher: Dispatcher
    bot: Bot | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tracking:
    """The tracker, and the sources of its inputs: pulses, deadlines, ports; reports come by the API's port."""

    tracker: Tracker
    sites: Sites
    pulse_queue: PulseQueue
    pulse_registry: PulseRegistry
    known_tunnels: KnownTunnels
    pulses: PulseProtocol
    own_address: OwnAddress
    ports: PortChecker
    presence: Presence
    overdue: Overdue
    overload: Overload


async def _run(
    settings: ServerSettings,
    system: Clock,
    stop: asyncio.Event,
    print_line: Callable[[str], None],
    store: Store,
    sockets: BoundSockets,
    started: Callable[[Store], None],
) -> None:
    """Make the parts, each from those before it; run them until `stop` is set."""
    clock = SteadyClock(system)
    alone = settings.database_url.startswith("sqlite:")
    keeper = Timekeeper(store, clock, lambda: _time(settings, system, store), settle_s=0.0 if alone else SETTLE_S)
    await keeper.start()
    secret = await _secret(store)
    if settings.api_key is None:
        await _first_key(store, clock, print_line)
    async with _client(settings) as http, asyncio.TaskGroup() as tasks:
        base = _ServerBase(
            settings=settings,
            store=store,
            clock=clock,
            keeper=keeper,
            secret=secret,
            registry=CollectorRegistry(),
            hub=Hub(),
            access=Access(store, clock, settings.api_key),
            http=http,
        )
        notifying = await _notify(base)
        tracking = await _track(base, notifying)
        dns_canary = None
        if settings.canary is not None:
            dns_canary = build_dns_canary(settings.canary, secret, tracking.own_address, base.registry)
        servers = _servers(base, notifying, tracking, dns_canary, sockets)

        running = [tasks.create_task(w, name=name) for name, w in _background_tasks(base, notifying, tracking).items()]
        pulses = tracking.pulses
        echo, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: pulses, sock=sockets.echo)
        if dns_canary is not None:
            await dns_canary.open(sockets.canary)
        closing = asyncio.Event()
        serving = [tasks.create_task(serve_until(server, bound, closing)) for server, bound in servers]
        await _announce_start(base, notifying.dispatcher)
        started(store)
        freeze_gc()
        await stop.wait()

        base.hub.close()
        closing.set()
        await asyncio.gather(*serving)
        echo.close()
        if dns_canary is not None:
            dns_canary.close()
        for task in running:
            task.cancel()
    log.info("server stopped")


def _client(settings: ServerSettings) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        verify=tls(settings.ca_file),
        timeout=httpx.Timeout(15.0, connect=10.0, read=60.0),
        limits=httpx.Limits(max_connections=20),
        trust_env=False,  # never the process's proxy settings: a proxy would see what the VPN's owner keeps separate
    )


async def _notify(base: _ServerBase) -> _Notifying:
    telegram, moved_chats = base.settings.telegram, MovedChats(base.store)
    bot_api = bot = None
    if telegram is not None:
        await moved_chats.load(telegram.chat_id)
        bot_api = BotApi(base.http, telegram, base.clock, moved=moved_chats)
        bot = Bot(bot_api, base.store, base.clock, telegram.chat_id, secrets.token_hex(8))
    channels = build_channels(base.settings, base.http, clock=base.clock, api=bot_api)
    metrics = NotifyMetrics(base.registry, channels)
    return _Notifying(dispatcher=Dispatcher(base.store, channels, base.clock, metrics), bot=bot)


async def _track(base: _ServerBase, notifying: _Notifying) -> _Tracking:
    settings, store, clock, keeper = base.settings, base.store, base.clock, base.keeper
    dispatcher = notifying.dispatcher
    pulse_queue = PulseQueue(clock.wall)
    pulse_registry = PulseRegistry(base.secret, pulse_queue.note)
    known_tunnels = KnownTunnels(pulse_registry, lambda: _names(store, clock))
    pulses = PulseProtocol(pulse_registry, clock.boottime, on_unknown=known_tunnels.refresh)
    PulseMetrics(base.registry, lambda: pulses.counts)
    sites = Sites(lambda name: _pulsed(pulse_registry, name, clock), clock_moved=lambda: keeper.moved)
    await sites.load(store, clock.wall())
    own_address = OwnAddress(base.http, settings.trace_url, _own_address_advice(settings))
    tracker = Tracker(
        store,
        clock,
        base.hub,
        settings.policy,
        channels=dispatcher.channels,
        on_commit=dispatcher.wake,
        own_address=own_address,
        sites=sites,
        clock_moved=lambda: keeper.moved,
    )
    presence = Presence(clock)
    return _Tracking(
        tracker=tracker,
        sites=sites,
        pulse_queue=pulse_queue,
        pulse_registry=pulse_registry,
        known_tunnels=known_tunnels,
        pulses=pulses,
        own_address=own_address,
        ports=PortChecker(tracker.forwarded if settings.port_check else {}, tracker.submit, clock),
        presence=presence,
        overdue=Overdue(store, tracker, clock, presence, keeper.follow),
        overload=Overload(store, dispatcher.channels, clock, presence, base.registry, dispatcher.wake),
    )


def _api(base: _ServerBase, tracking: _Tracking) -> ReportRouter:
    """The application on the API's port: reports, and behind them the routes that read."""
    settings, clock = base.settings, base.clock
    admission = Admission(settings, base.access, clock)
    sessions = Sessions(
        tracking.tracker,
        base.store,
        clock,
        echo_secret=base.secret,
        echo_port=settings.api_port,
        missed=settings.missed_reports,
        canary_zone=settings.canary.zone if settings.canary else None,
        pulse_registry=tracking.pulse_registry,
    )
    keepalives = Keepalives(admission, tracking.tracker, clock, settings.keepalive_timeout)
    services = ApiServices(store=base.store, access=base.access, hub=base.hub, settings=settings, clock=clock)
    per_client = 10 * settings.rate_limit
    return ReportRouter(admission, keepalives, sessions, build_api(services), settings.api_path, per_client=per_client)


def _servers(
    base: _ServerBase, notifying: _Notifying, tracking: _Tracking, dns_canary: DnsListener | None, sockets: BoundSockets
) -> list[tuple[EmbeddedServer, socket.socket]]:
    """Each port's server with its socket."""
    settings, store, clock = base.settings, base.store, base.clock
    health = build_health(
        HealthServices(
            store=store,
            clock=clock,
            registry=base.registry,
            dispatcher=notifying.dispatcher.healthy,
            deadlines=tracking.overdue.healthy,
            dns_canary=dns_canary.healthy if dns_canary else None,
        )
    )
    api = embedded(_api(base, tracking), cert=settings.tls_cert, key=settings.tls_key)
    found = {"api": (api, sockets.api), "health": (embedded(health, side=True), sockets.health)}
    if sockets.dashboard is not None:
        dashboard = build_dashboard(DashboardServices(store=store, hub=base.hub, settings=settings, clock=clock))
        found["dashboard"] = (embedded(dashboard, side=True), sockets.dashboard)
    limits = {name: server.connection_limit for name, (server, _) in found.items()}
    ConnectionMetrics(base.registry, limits | ({"canary": dns_canary.connection_limit} if dns_canary else {}))
    return list(found.values())


def _background_tasks(
    base: _ServerBase, notifying: _Notifying, tracking: _Tracking
) -> dict[str, Coroutine[Any, Any, None]]:
    """The tasks that run beside the servers, by name."""
    store, clock, registry = base.store, base.clock, base.registry
    tasks_by_name = {
        "tracker": tracking.tracker.run(),
        "dispatcher": notifying.dispatcher.run(),
        "presence": tracking.presence.run(),
        "overdue": tracking.overdue.run(),
        "overload": tracking.overload.run(),
        "descriptors": Descriptors(clock, registry).run(),
        "memory": trim_heap(),
        "retention": Retention(store, clock, base.settings.retention_days).run(),
        "own address": tracking.own_address.run(),
        "sites": tracking.sites.run(store, clock),
        "ports": tracking.ports.run(),
        "names of pulses": tracking.known_tunnels.run(),
        "pulse queue": tracking.pulse_queue.run(tracking.tracker.submit),
        "engine": _engine_task(base.settings, store, base.hub, clock, notifying.dispatcher, registry).run(),
    }
    return tasks_by_name if notifying.bot is None else tasks_by_name | {"bot": notifying.bot.run()}


async def _announce_start(base: _ServerBase, dispatcher: Dispatcher) -> None:
    at = base.clock.wall()
    if base.settings.database_url.startswith("sqlite:"):
        # No other server delivers from this file: an open lease is a crashed server's, and need not expire.
        await base.store.write(update(outbox).where(outbox.c.settled_at.is_(None)).values(leased_until=0.0))
    notice = Notice(kind=Kind.SERVER_STARTED, at=at, details=(f"Version {__version__}",))
    if deliveries := delivery_rows(notice, dispatcher.channels, at):
        await base.store.write(insert(outbox).values(deliveries))
    dispatcher.wake()
    log.info("server started", extra={"version": __version__, "port": base.settings.api_port})


def _engine_task(
    settings: ServerSettings, store: Store, hub: Hub, clock: Clock, dispatcher: Dispatcher, registry: CollectorRegistry
) -> Upkeep | ReplicaPoller:
    """Upkeep for a SQLite file, which only this server uses; a poller for PostgreSQL, which others may use too."""
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
    return ReplicaPoller(store, hub, clock)


def _own_address_advice(settings: ServerSettings) -> tuple[str, ...]:
    """Sentences on what does not work while the server's own public address is unknown, and what to set."""
    advice = []
    if not settings.policy.home_networks:
        advice.append(
            "it cannot be judged yet whether old clients (bare keepalives) report from home: this server's public "
            "address, which counts as their home, could not be found out; VPN_SENTINEL_HOME_NETWORKS sets it"
        )
    if settings.canary is not None and not settings.canary.addresses:
        advice.append(
            "the canary zone's nameserver has no address yet: this server's public one could not be found out; "
            "VPN_SENTINEL_CANARY_ADDRESSES sets it"
        )
    return tuple(advice)


async def _time(settings: ServerSettings, system: Clock, store: Store) -> float:
    """The time of the clock that all servers of the database share."""
    return system.wall() if settings.database_url.startswith("sqlite:") else await database_time(store)


async def _names(store: Store, clock: Clock) -> dict[str, float]:
    """The time of the last report of each tunnel that may send pulses, in boot time."""
    offset = clock.wall() - clock.boottime()
    return {name: at - offset for name, at in (await known_names(store)).items()}


def _pulsed(pulse_registry: PulseRegistry, name: str, clock: Clock) -> Span | None:
    """The time in which pulses of `name` last came over the internet without a gap, by the wall clock."""
    offset = clock.wall() - clock.boottime()
    span = pulse_registry.gapless_span(name)
    return None if span is None else (span[0] + offset, span[1] + offset)


async def _first_key(store: Store, clock: Clock, print_line: Callable[[str], None]) -> None:
    """Create and print the installation's first shared key, where there never was one."""

    def show(key: str) -> None:
        with contextlib.suppress(OSError):  # a full disk behind standard output; the log says what to do
            print_line(
                f"A first key was made. It is shown only now; agents send it as VPN_SENTINEL_API_KEY:\n\n    {key}\n"
            )

    if await first_key(store, clock.wall(), show):
        another = "vpn-sentinel token create NAME --shared"
        log.info("a first key was made and printed, once; if it was missed, make another", extra={"by": another})


async def _secret(store: Store) -> bytes:
    """The installation's secret of 32 bytes, made once: the keys of the UDP echo are derived from it."""
    asked = select(meta.c.value).where(meta.c.key == "secret")
    if not (found := await store.read(asked)):
        # Two replicas may start at the same time: the second one uses the first one's.
        add = text("INSERT INTO meta (key, value) VALUES ('secret', :made) ON CONFLICT (key) DO NOTHING")
        await store.write(add.bindparams(made=secrets.token_hex(32)))
        found = await store.read(asked)
    return bytes.fromhex(found[0].value)
