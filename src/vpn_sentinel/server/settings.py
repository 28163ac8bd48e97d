"""The server's settings: declared, and read once into a frozen object."""

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy
from vpn_sentinel.runtime import parsers as p
from vpn_sentinel.runtime.idle import is_off
from vpn_sentinel.runtime.pem import PairError, try_pair
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import Idle, Section, SettingError, Source, fill, key_of, of
from vpn_sentinel.runtime.urls import address_of
from vpn_sentinel.server.store.address import parse
from vpn_sentinel.wire.settings import (
    API_PATH,
    DEBUG,
    EVERYWHERE,
    LOG_FILE,
    POLICY,
    TIMES,
    read_data_dir,
    read_policy,
)

_BACKUP_FOLDER: Final = "backups"  # beside the database
_DNS_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_BOT_TOKEN: Final = re.compile(r"[0-9]+:[A-Za-z0-9_-]+", re.ASCII)
_CHAT: Final = re.compile(r"(-?[0-9]{1,20}|@[A-Za-z_][A-Za-z0-9_]*)(?::([0-9]{1,10}))?", re.ASCII)
_GENERAL_TOPIC: Final = 1  # Telegram accepts messages for it only without this number
_MIN_KEY_CHARS: Final = 8
_MAX_ZONE_CHARS: Final = 190  # of the 253 of a name, to leave room for an agent's label


def _domain(value: str) -> str:
    name = value.rstrip(".").lower()
    labels = name.split(".")
    if len(labels) < 2 or len(name) > _MAX_ZONE_CHARS or not all(_DNS_LABEL.fullmatch(label) for label in labels):
        msg = f"{value!r} is not a domain name such as canary.example.org"
        raise ValueError(msg)
    return name


def _domains(value: str) -> tuple[str, ...]:
    return tuple(_domain(part) for part in p.listed(value))


def _database_url(value: str) -> str:
    """The address of a file or of PostgreSQL. Raises ValueError that does not repeat a password."""
    if not value.startswith("sqlite:///"):
        parse(value)
        return value
    path = value.removeprefix("sqlite:///")
    if path in ("", ":memory:") or path.endswith("/") or "?" in path:
        msg = f"{value!r} names no file: sqlite:///PATH takes the path of one, as it stands, and no parameters"
        raise ValueError(msg)
    return value


def _key(value: str) -> Secret:
    if len(value) < _MIN_KEY_CHARS:
        msg = f"is too short: a key takes at least {_MIN_KEY_CHARS} characters"
        raise ValueError(msg)
    if not (value.isascii() and value.isprintable()):
        msg = "takes printable ASCII characters: a header carries no others"
        raise ValueError(msg)
    return Secret(value)


def _chat(value: str) -> tuple[str, int | None]:
    """A chat, and the topic in it. Raises ValueError."""
    found = _CHAT.fullmatch(value)
    if found is None:
        msg = f"{value!r} is neither a chat's number nor a channel's @name, with or without a topic (-1001234567890:45)"
        raise ValueError(msg)
    chat, topic = found.groups()
    return chat, int(topic) if topic is not None and int(topic) > _GENERAL_TOPIC else None


def _requestable(value: str) -> str:
    """A URL of the server's own requests: httpx accepts fewer names than the agent's client. Raises ValueError."""
    if value.isascii() and "xn--" not in value.lower():
        return value
    import httpx  # not at the top: settings are also read without the server's packages

    try:
        host = httpx.URL(value).host  # reading it parses the name
    except (httpx.InvalidURL, ValueError):
        host = ""
    if not host:
        msg = "names a host that is none by IDNA 2008 (RFC 5891)"
        raise ValueError(msg)
    return value


def _trace_url(value: str) -> str:
    return _requestable(p.url(value))


def _telegram_url(value: str) -> str:
    return _requestable(p.url_with_login(value))


def _webhook_url(value: str) -> Secret:
    return Secret(_requestable(address_of(value)))


def _is_postgres(value: str) -> bool:
    return value.startswith("postgres")


def _is_zero(value: str) -> bool:
    return not float(value)


# --- the settings -----------------------------------------------------------------------------------------------------

DATABASE: Final = Section("Server: database, keys, backups", read_by=("server",))
DATABASE_URL: Final = DATABASE.add(
    "DATABASE_URL",
    _database_url,
    None,
    "`sqlite:///PATH`, the literal path of a file, or `postgresql://USER:PASSWORD@HOST/NAME`, in every form that "
    "[libpq documents](https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS): `sslmode`, "
    "`sslrootcert`, several hosts, a socket (`?host=/run/postgresql`), `options`, `passfile`, `PGPASSWORD`. Of several "
    "hosts the one that accepts writes is used. `service` is not supported, nor `hostaddr` together with a host and "
    "`verify-full`; `channel_binding=require` is not checked (the start says so). PgBouncer may be in between, in any "
    "mode but `statement`. The database's encoding must be UTF8",
    default_text="`sqlite:///DATA_DIR/sentinel.db`",
)
_NO_SQLITE: Final = Idle(disabled_by="DATABASE_URL", disables=_is_postgres, shown="postgresql://…")

LISTENING: Final = Section("Server: addresses, ports, TLS", read_by=("server",))

DASHBOARD: Final = Section("Server: dashboard", read_by=("server",))
_NO_DASHBOARD: Final = (
    Idle(disabled_by="SERVER_WEB_DASHBOARD_ENABLED", disables=is_off),
    Idle(disabled_by="SERVER_DASHBOARD_ENABLED", disables=is_off),
)
DASHBOARD_PUBLIC: Final = DASHBOARD.add(
    "DASHBOARD_PUBLIC",
    p.boolean,
    False,
    "true lets the dashboard listen on all addresses. It has no login",
    idle=_NO_DASHBOARD,
)
SERVER_WEB_DASHBOARD_ENABLED: Final = DASHBOARD.add(
    "SERVER_WEB_DASHBOARD_ENABLED", p.boolean, True, "false: no dashboard"
)
SERVER_DASHBOARD_ENABLED: Final = DASHBOARD.add(
    "SERVER_DASHBOARD_ENABLED", p.boolean, True, "the same: false in either one turns it off"
)

ACCESS: Final = Section("Server: who has access", read_by=("server",))

DEADLINES: Final = Section("Server: silence, and checks from outside", read_by=("server",))
CLIENT_TIMEOUT_MINUTES: Final = DEADLINES.add(
    "CLIENT_TIMEOUT_MINUTES",
    p.number(0.05, 1440, "minutes"),
    15.0,
    "minutes without a keepalive after which a tunnel of the old client is silent",
    old_names=("SERVER_ALERT_THRESHOLD_MINUTES",),
)
SERVER_CHECK_INTERVAL_MINUTES: Final = DEADLINES.add(
    "SERVER_CHECK_INTERVAL_MINUTES",
    p.number(0.05, 1440, "minutes"),
    5.0,
    "validated, but without effect: deadlines are checked once a second",
)

NOTICES: Final = Section("Server: notices", read_by=("server",))
TELEGRAM_BOT_TOKEN: Final = NOTICES.add("TELEGRAM_BOT_TOKEN", p.secret, None, "the bot's token; see [Telegram](bot.md)")
TELEGRAM_CHAT_ID: Final = NOTICES.add(
    "TELEGRAM_CHAT_ID",
    _chat,
    None,
    "the only chat that gets messages and may use the bot: its number, or a channel's `@name`; with a [topic](bot.md) "
    "as `-1001234567890:45`",
)
TELEGRAM_ENABLED: Final = NOTICES.add(
    "TELEGRAM_ENABLED",
    p.boolean,
    None,
    "false turns Telegram off",
    default_text="true when token or chat is set",
)
TELEGRAM_API_URL: Final = NOTICES.add(
    "TELEGRAM_API_URL",
    _telegram_url,
    "https://api.telegram.org",
    "base address of the Bot API",
    idle=(Idle(needs=("TELEGRAM_BOT_TOKEN",)),),
)
WEBHOOK_URL: Final = NOTICES.add("WEBHOOK_URL", _webhook_url, None, "the address to which notices are posted as JSON")
_NO_WEBHOOK: Final = Idle(needs=("WEBHOOK_URL",))
WEBHOOK_SECRET: Final = NOTICES.add(
    "WEBHOOK_SECRET", p.secret, None, "signs each body (HMAC-SHA256)", idle=(_NO_WEBHOOK,)
)

DNS_CANARY: Final = Section("Server: a DNS zone of its own", read_by=("server",))
CANARY_ZONE: Final = DNS_CANARY.add(
    "CANARY_ZONE",
    _domain,
    None,
    "the DNS zone that is delegated to this server, such as `canary.example.org`; see "
    "[a zone of your own](../how-to/dns-canary.md). None: no DNS is served",
)
_NO_ZONE: Final = Idle(needs=("CANARY_ZONE",))
CANARY_HOST: Final = DNS_CANARY.add(
    "CANARY_HOST",
    p.addresses,
    p.NO_ADDRESSES,
    "the addresses to listen on for DNS; `::` means IPv4 and IPv6. TCP and UDP",
    default_text="`::`",
    idle=(_NO_ZONE,),
)
CANARY_PORT: Final = DNS_CANARY.add("CANARY_PORT", p.port, 53, "the port to listen on for DNS", idle=(_NO_ZONE,))
CANARY_NS: Final = DNS_CANARY.add(
    "CANARY_NS",
    _domains,
    p.NO_TEXTS,
    "the names of this server in NS records, as in the delegation",
    default_text="`ns.` and the zone",
    idle=(_NO_ZONE,),
)
CANARY_ADDRESSES: Final = DNS_CANARY.add(
    "CANARY_ADDRESSES",
    p.addresses,
    p.NO_ADDRESSES,
    "the addresses of the names in `VPN_SENTINEL_CANARY_NS` that are in the zone",
    default_text="the server's public address",
    idle=(_NO_ZONE,),
)

# All that a server reads.
SECTIONS: Final = (DATABASE, LISTENING, DASHBOARD, ACCESS, DEADLINES, TIMES, NOTICES, DNS_CANARY, POLICY, EVERYWHERE)


# --- the objects made from them ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TelegramSettings:
    """`chat_id` is the only chat that gets notices and answers; `topic` (a `message_thread_id`) is for the notices."""

    token: Secret
    chat_id: str
    api_url: str
    topic: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookSettings:
    """The address may hold a credential, so it is a `Secret`. `secret` signs each body, when set."""

    url: Secret
    secret: Secret | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsCanarySettings:
    """The DNS zone that this server answers for. `servers` are the names in its NS records, `addresses` theirs."""

    zone: str
    hosts: tuple[str, ...]
    port: int
    servers: tuple[str, ...]
    addresses: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Durations are in seconds. With empty `allowed_ips` every address may report; it still needs a key.

    `backup_hours` is 0 for no scheduled backups.
    """

    data_dir: Path
    database_url: str
    api_key: Secret | None = DATABASE.field(
        "API_KEY",
        _key,
        None,
        "a shared key, at least 8 characters: it may report under any name and read everything. Without it a first key "
        "is made and printed once",
    )
    retention_days: float = DATABASE.field(
        "RETENTION_DAYS",
        p.number(0.01, 3650, "days"),
        30.0,
        "days for which observations are kept; transitions, closed incidents and settled deliveries twelve times as "
        "long",
    )
    backup_hours: float = DATABASE.field(
        "BACKUP_HOURS",
        p.number(0, 8760, "hours"),
        24.0,
        "hours between two [backups](../how-to/database.md) of the SQLite database; 0: none",
        idle=(_NO_SQLITE,),
    )
    backup_keep: int = DATABASE.field(
        "BACKUP_KEEP",
        p.integer(1, 1000),
        3,
        "how many of the newest backups are kept",
        idle=(Idle(disabled_by="BACKUP_HOURS", disables=_is_zero), _NO_SQLITE),
    )
    backup_dir: Path | None = DATABASE.field(
        "BACKUP_DIR",
        Path,
        None,
        "the folder of the backups; another disk is better. Created and tested at the start. No effect with PostgreSQL",
        default_text="`backups` next to the database",
        idle=(_NO_SQLITE,),  # without a schedule `db backup` uses it all the same
    )
    host: str = LISTENING.field(
        "SERVER_HOST",
        p.listening_host,
        "::",  # both families: agents report from anywhere; every route asks for a key
        "the address to listen on for agents and API, or a name of this host; `::` means IPv4 and IPv6, or IPv4 alone "
        "on a machine without IPv6. TCP and UDP",
    )
    api_port: int = LISTENING.field(
        "SERVER_API_PORT", p.port, 5000, "port of the API and the agents (TCP) and of the echo (UDP)"
    )
    api_path: str = of(API_PATH)
    tls_cert: Path | None = LISTENING.field(
        "TLS_CERT_PATH",
        p.readable_file,
        None,
        "certificate of the API's port, PEM; with it the port speaks only HTTPS",
        pair="TLS_KEY_PATH",
    )
    tls_key: Path | None = LISTENING.field(
        "TLS_KEY_PATH", p.readable_file, None, "the certificate's key, PEM", pair="TLS_CERT_PATH"
    )
    public_url: str | None = LISTENING.field(
        "PUBLIC_URL",
        p.url,
        None,
        "the server's address for its users: shown on the empty dashboard, and accepted as the dashboard's host name. "
        "`up` with a certificate needs it: its own agent reports to this address",
    )
    health_host: str = LISTENING.field(
        "SERVER_HEALTH_HOST",
        p.listening_host,
        "::",  # says no name and no address
        "the address to listen on for health and metrics, which have no login and name no tunnel",
    )
    health_port: int = LISTENING.field("SERVER_HEALTH_PORT", p.port, 8081, "the port of health and metrics")
    dashboard_port: int = DASHBOARD.field(
        "SERVER_DASHBOARD_PORT", p.port, 8080, "the dashboard's port", idle=_NO_DASHBOARD
    )
    dashboard_host: str
    dashboard_enabled: bool
    allowed_ips: tuple[IPNetwork, ...] = ACCESS.field(
        "SERVER_ALLOWED_IPS",
        p.networks,
        p.NO_NETWORKS,
        "addresses and networks that may report and read the API; a key is needed in any case. `/whoami` and the "
        "schema stay open",
        default_text="all",
    )
    trusted_proxies: tuple[IPNetwork, ...] = ACCESS.field(
        "TRUSTED_PROXIES",
        p.networks,
        p.NO_NETWORKS,
        "addresses and networks of reverse proxies, and of nothing else, whose `X-Forwarded-For` is trusted. "
        "`Forwarded` and `X-Real-IP` are not read: if such a proxy sends no `X-Forwarded-For`, the client's address is "
        "unknown, which is logged once, and an allow-list refuses it",
    )
    rate_limit: int = ACCESS.field(
        "SERVER_RATE_LIMIT_REQUESTS",
        p.integer(1, 1_000_000),
        30,
        "requests a minute: keepalives of one address, reports by POST of one agent. WebSockets are not counted",
    )
    keepalive_timeout: float
    missed_reports: int = DEADLINES.field(
        "MISSED_REPORTS",
        p.integer(1, 100),
        3,
        "reports that an agent may miss before it is silent: this many times its interval, plus one second",
    )
    port_check: bool = DEADLINES.field(
        "PORT_CHECK",
        p.boolean,
        True,
        "false: the server does not check forwarded ports. It checks them only at an address that the tunnel's own "
        "packets came from",
    )
    trace_url: str = DEADLINES.field(
        "TRACE_URL",
        _trace_url,
        "https://1.1.1.1",
        "base address of Cloudflare's trace, which returns the server's own public address",
    )
    policy: Policy
    telegram: TelegramSettings | None
    webhook: WebhookSettings | None
    webhook_private: bool = NOTICES.field(
        "WEBHOOK_ALLOW_PRIVATE",
        p.boolean,
        False,
        "true allows a webhook at private and local addresses",
        idle=(_NO_WEBHOOK,),
    )
    ca_file: Path | None = NOTICES.field(
        "CA_FILE",
        p.authorities,
        None,
        "further certificate authorities, PEM, in addition to the system's: for Telegram and the webhook",
    )
    canary: DnsCanarySettings | None = None
    debug: bool = of(DEBUG)
    log_file: str | None = of(LOG_FILE)

    @property
    def database_file(self) -> Path | None:
        """The file of a SQLite database, None for PostgreSQL."""
        url = self.database_url
        return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None

    @property
    def backup_folder(self) -> Path | None:
        """The folder of its backups; None for PostgreSQL, which has its own tools."""
        file = self.database_file
        return None if file is None else self.backup_dir or file.parent / _BACKUP_FOLDER

    @classmethod
    def read(cls, source: Source) -> "ServerSettings":
        """Read and check every setting. Raises SettingError that names the first one that cannot be used."""
        get = source.get
        data_dir = read_data_dir(source)
        get(SERVER_CHECK_INTERVAL_MINUTES)
        settings = fill(
            cls,
            source,
            data_dir=data_dir,
            database_url=get(DATABASE_URL) or f"sqlite:///{data_dir}/sentinel.db",
            dashboard_host="::" if get(DASHBOARD_PUBLIC) else "127.0.0.1",
            dashboard_enabled=all((get(SERVER_WEB_DASHBOARD_ENABLED), get(SERVER_DASHBOARD_ENABLED))),
            keepalive_timeout=60 * get(CLIENT_TIMEOUT_MINUTES),
            policy=read_policy(source, "server"),
            telegram=_telegram(source),
            webhook=_webhook(source),
            canary=_dns_canary(source),
        )
        _check_pair(settings.tls_cert, settings.tls_key)
        _check_ports(settings)
        return settings


def _check_pair(cert: Path | None, key: Path | None) -> None:
    if cert is not None and key is not None:
        try:
            try_pair(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), cert, key, "")
        except PairError as e:
            raise SettingError(key_of("TLS_KEY_PATH" if e.of_key else "TLS_CERT_PATH"), str(e)) from e
    elif cert is not None or key is not None:
        missing = "TLS_KEY_PATH" if key is None else "TLS_CERT_PATH"
        raise SettingError(key_of(missing), "is needed too: a certificate and its key come together")


def _check_ports(settings: ServerSettings) -> None:
    named = {"SERVER_API_PORT": settings.api_port, "SERVER_HEALTH_PORT": settings.health_port}
    if settings.dashboard_enabled:
        named["SERVER_DASHBOARD_PORT"] = settings.dashboard_port
    if settings.canary is not None:
        named["CANARY_PORT"] = settings.canary.port
    seen: dict[int, str] = {}
    for name, port in named.items():
        if port in seen:
            raise SettingError(key_of(name), f"{port} is taken by {key_of(seen[port])}")
        seen[port] = name


def _dns_canary(source: Source) -> DnsCanarySettings | None:
    zone, hosts, port = source.get(CANARY_ZONE), source.get(CANARY_HOST), source.get(CANARY_PORT)
    servers, addresses = source.get(CANARY_NS), source.get(CANARY_ADDRESSES)
    if zone is None:
        return None
    return DnsCanarySettings(
        zone=zone,
        hosts=tuple(str(a) for a in hosts) or ("::",),
        port=port,
        servers=servers or (f"ns.{zone}",),
        addresses=addresses,
    )


def _telegram(source: Source) -> TelegramSettings | None:
    token, chat, url = source.get(TELEGRAM_BOT_TOKEN), source.get(TELEGRAM_CHAT_ID), source.get(TELEGRAM_API_URL)
    enabled = source.get(TELEGRAM_ENABLED)
    if enabled is False or (enabled is None and token is None and chat is None):
        return None
    if token is None or chat is None:
        missing = TELEGRAM_BOT_TOKEN if token is None else TELEGRAM_CHAT_ID
        raise SettingError(missing.key, f"is needed for Telegram ({TELEGRAM_ENABLED.key}=false turns it off)")
    if not _BOT_TOKEN.fullmatch(token.reveal()):
        raise SettingError(TELEGRAM_BOT_TOKEN.key, "is not a bot token such as 123456:ABC-DEF")
    number, topic = chat
    return TelegramSettings(token=token, chat_id=number, api_url=url, topic=topic)


def _webhook(source: Source) -> WebhookSettings | None:
    url, secret = source.get(WEBHOOK_URL), source.get(WEBHOOK_SECRET)
    return None if url is None else WebhookSettings(url=url, secret=secret)
