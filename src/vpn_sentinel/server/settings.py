"""The server's settings, read once. `docs/reference/settings.md` lists them with their defaults."""

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy
from vpn_sentinel.runtime import settings as read
from vpn_sentinel.runtime.pem import PairError, try_pair
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import SettingError, Source
from vpn_sentinel.runtime.urls import address_of
from vpn_sentinel.server.store.address import parse

_BACKUPS: Final = "backups"  # the folder beside the database
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_BOT_TOKEN: Final = re.compile(r"[0-9]+:[A-Za-z0-9_-]+", re.ASCII)
_CHAT: Final = re.compile(r"-?[0-9]{1,20}|@[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_NO_ADDRESSES: Final[tuple[IPAddress, ...]] = ()
_NO_NAMES: Final[tuple[str, ...]] = ()
_LONGEST_ZONE: Final = 190  # of 253, to leave room for an agent's label


@dataclass(frozen=True, slots=True, kw_only=True)
class Telegram:
    """`chat_id` is the only chat that is told and served."""

    token: Secret
    chat_id: str
    api_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """The address may hold a credential, so it is kept as one. `secret` signs each body, when set."""

    url: Secret
    secret: Secret | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """The DNS zone that this server answers for. `servers` are its names in NS records, `addresses` theirs."""

    zone: str
    hosts: tuple[str, ...]
    port: int
    servers: tuple[str, ...]
    addresses: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Durations are seconds. `allowed_ips` empty means every address may report; it still needs a key.

    `backup_hours` is 0 for no backups by schedule.
    """

    data_dir: Path
    database_url: str
    host: str
    api_port: int
    api_path: str
    health_port: int
    health_host: str
    dashboard_port: int
    dashboard_host: str
    dashboard_enabled: bool
    api_key: Secret | None
    allowed_ips: tuple[IPNetwork, ...]
    trusted_proxies: tuple[IPNetwork, ...]
    rate_limit: int
    keepalive_timeout: float
    missed_reports: int
    retention_days: float
    backup_dir: Path | None
    backup_hours: float
    backup_keep: int
    port_check: bool
    policy: Policy
    telegram: Telegram | None
    webhook: Webhook | None
    webhook_private: bool
    trace_url: str
    ca_file: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    public_url: str | None
    debug: bool
    log_file: str | None
    canary: Canary | None = None

    @property
    def database_file(self) -> Path | None:
        """The file of a SQLite database, None for PostgreSQL."""
        url = self.database_url
        return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None

    @property
    def backup_folder(self) -> Path | None:
        """Where copies of it are kept; None for PostgreSQL, which has its own ways."""
        file = self.database_file
        return None if file is None else self.backup_dir or file.parent / _BACKUPS

    @classmethod
    def read(cls, source: Source) -> "ServerSettings":
        """Read and check every setting. Raises SettingError that names the first one that cannot be used."""
        get = source.get
        public = get("DASHBOARD_PUBLIC", read.boolean, default=False)
        data_dir = Path(get("DATA_DIR", read.text, read.default_data_dir()))
        # The replaced system names the silence after which it warned twice; the more specific name wins.
        threshold = get("SERVER_ALERT_THRESHOLD_MINUTES", read.number(0.05, 1440, "minutes"), 15.0)
        get("SERVER_CHECK_INTERVAL_MINUTES", read.number(0.05, 1440, "minutes"), 5.0)
        cert = get("TLS_CERT_PATH", read.readable_file, None)
        key = get("TLS_KEY_PATH", read.readable_file, None)
        if (cert is None) != (key is None):
            missing = "TLS_KEY_PATH" if key is None else "TLS_CERT_PATH"
            raise SettingError(read.PREFIX + missing, "is needed too: a certificate and its key come together")
        if cert is not None and key is not None:
            _check_pair(cert, key)
        settings = cls(
            data_dir=data_dir,
            database_url=get("DATABASE_URL", _database_url, f"sqlite:///{data_dir}/sentinel.db"),
            host=get(
                "SERVER_HOST", read.listening_host, "::"
            ),  # both families: agents report from anywhere; every route asks for a key
            api_port=get("SERVER_API_PORT", read.port, 5000),
            api_path=get("API_PATH", read.path, "/api/v1"),
            health_port=get("SERVER_HEALTH_PORT", read.port, 8081),
            health_host=get("SERVER_HEALTH_HOST", read.listening_host, "::"),  # says no name and no address
            dashboard_port=get("SERVER_DASHBOARD_PORT", read.port, 8080),
            dashboard_host="::" if public else "127.0.0.1",  # the owner said so
            dashboard_enabled=get("SERVER_WEB_DASHBOARD_ENABLED", read.boolean, default=True)
            and get("SERVER_DASHBOARD_ENABLED", read.boolean, default=True),
            api_key=get("API_KEY", _key, None),
            allowed_ips=get("SERVER_ALLOWED_IPS", read.networks, ()),
            trusted_proxies=get("TRUSTED_PROXIES", read.networks, ()),
            rate_limit=get("SERVER_RATE_LIMIT_REQUESTS", read.integer(1, 1_000_000), 30),
            keepalive_timeout=60 * get("CLIENT_TIMEOUT_MINUTES", read.number(0.05, 1440, "minutes"), threshold),
            missed_reports=get("MISSED_REPORTS", read.integer(1, 100), 3),
            port_check=get("PORT_CHECK", read.boolean, default=True),
            retention_days=get("RETENTION_DAYS", read.number(0.01, 3650, "days"), 30.0),
            backup_dir=get("BACKUP_DIR", Path, None),
            backup_hours=get("BACKUP_HOURS", read.number(0, 8760, "hours"), 24.0),
            backup_keep=get("BACKUP_KEEP", read.integer(1, 1000), 3),
            policy=Policy(
                home_networks=get("HOME_NETWORKS", read.home_networks, ()),
                expected_countries=get("EXPECTED_COUNTRIES", read.countries, ()),
                allowed_resolvers=get("ALLOWED_RESOLVERS", read.networks, ()),
                allowed_outside=get("ALLOWED_OUTSIDE", read.networks, ()),
                grace_down=get("GRACE_DOWN", read.number(0, 3600, "seconds"), Policy.grace_down),
                grace_degraded=get("GRACE_DEGRADED", read.number(0, 3600, "seconds"), Policy.grace_degraded),
                grace_unverified=get("GRACE_UNVERIFIED", read.number(0, 3600, "seconds"), Policy.grace_unverified),
                grace_recovery=get("GRACE_RECOVERY", read.number(0, 3600, "seconds"), Policy.grace_recovery),
                flap_calm=get("FLAP_CALM", read.number(0, 86400, "seconds"), Policy.flap_calm),
            ),
            telegram=_telegram(source),
            webhook=_webhook(source),
            webhook_private=get("WEBHOOK_ALLOW_PRIVATE", read.boolean, default=False),
            trace_url=get("TRACE_URL", lambda v: _asked(read.url(v)), "https://1.1.1.1"),
            ca_file=get("CA_FILE", read.authorities, None),
            tls_cert=cert,
            tls_key=key,
            public_url=get("PUBLIC_URL", read.url, None),
            debug=get("DEBUG", read.boolean, default=False),
            log_file=get("LOG_FILE", read.text, None),
            canary=_canary(source),
        )
        source.raw("TZ")  # the system's: see runtime.timezone
        _distinct_ports(settings)
        return settings


def _check_pair(cert: Path, key: Path) -> None:
    try:
        try_pair(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), cert, key, "")
    except PairError as e:
        raise SettingError(read.PREFIX + ("TLS_KEY_PATH" if e.of_key else "TLS_CERT_PATH"), str(e)) from e


def _distinct_ports(settings: ServerSettings) -> None:
    named = {"SERVER_API_PORT": settings.api_port, "SERVER_HEALTH_PORT": settings.health_port}
    if settings.dashboard_enabled:
        named["SERVER_DASHBOARD_PORT"] = settings.dashboard_port
    if settings.canary is not None:
        named["CANARY_PORT"] = settings.canary.port
    seen: dict[int, str] = {}
    for name, port in named.items():
        if port in seen:
            raise SettingError(read.PREFIX + name, f"{port} is taken by {read.PREFIX}{seen[port]}")
        seen[port] = name


def _canary(source: Source) -> Canary | None:
    zone = source.get("CANARY_ZONE", _domain, None)
    hosts = source.get("CANARY_HOST", read.addresses, _NO_ADDRESSES)
    port = source.get("CANARY_PORT", read.port, 53)
    servers = source.get("CANARY_NS", _domains, _NO_NAMES)
    addresses = source.get("CANARY_ADDRESSES", read.addresses, _NO_ADDRESSES)
    if zone is None:
        return None
    return Canary(
        zone=zone,
        hosts=tuple(str(a) for a in hosts) or ("::",),
        port=port,
        servers=servers or (f"ns.{zone}",),
        addresses=addresses,
    )


def _domain(value: str) -> str:
    name = value.rstrip(".").lower()
    labels = name.split(".")
    if len(labels) < 2 or len(name) > _LONGEST_ZONE or not all(_LABEL.fullmatch(label) for label in labels):
        msg = f"{value!r} is not a domain name such as canary.example.org"
        raise ValueError(msg)
    return name


def _domains(value: str) -> tuple[str, ...]:
    return tuple(_domain(part) for part in read.listed(value))


def _database_url(value: str) -> str:
    """A file's or a PostgreSQL's address. Raises ValueError that repeats no password."""
    if not value.startswith("sqlite:///"):
        parse(value)
        return value
    path = value.removeprefix("sqlite:///")
    if path in ("", ":memory:") or path.endswith("/") or "?" in path:
        msg = f"{value!r} names no file: sqlite:///PATH takes the path of one, as it stands, and no parameters"
        raise ValueError(msg)
    return value


def _key(value: str) -> Secret:
    if len(value) < 8:
        msg = "is too short: a key takes at least 8 characters"
        raise ValueError(msg)
    if not (value.isascii() and value.isprintable()):
        msg = "takes printable ASCII characters: a header carries no others"
        raise ValueError(msg)
    return Secret(value)


def _telegram(source: Source) -> Telegram | None:
    token = source.get("TELEGRAM_BOT_TOKEN", read.secret, None)
    chat = source.get("TELEGRAM_CHAT_ID", _chat, None)
    url = source.get("TELEGRAM_API_URL", lambda v: _asked(read.url_with_login(v)), "https://api.telegram.org")
    enabled = source.get("TELEGRAM_ENABLED", read.boolean, default=token is not None or chat is not None)
    if not enabled:
        return None
    if token is None:
        raise SettingError(
            "TELEGRAM_BOT_TOKEN", "is needed for Telegram (VPN_SENTINEL_TELEGRAM_ENABLED=false turns it off)"
        )
    if chat is None:
        raise SettingError(
            "TELEGRAM_CHAT_ID", "is needed for Telegram (VPN_SENTINEL_TELEGRAM_ENABLED=false turns it off)"
        )
    if not _BOT_TOKEN.fullmatch(token.reveal()):
        raise SettingError("TELEGRAM_BOT_TOKEN", "is not a bot token such as 123456:ABC-DEF")
    return Telegram(token=token, chat_id=chat, api_url=url)


def _chat(value: str) -> str:
    if not _CHAT.fullmatch(value):
        msg = f"{value!r} is neither a chat's number nor a channel's @name"
        raise ValueError(msg)
    return value


def _asked(value: str) -> str:
    """An address that the server itself asks: httpx takes fewer names than the agent's client. Raises ValueError."""
    if value.isascii() and "xn--" not in value.lower():
        return value
    import httpx  # not where settings are read without the server's packages

    try:
        host = httpx.URL(value).host  # to read it takes it apart
    except (httpx.InvalidURL, ValueError):
        host = ""
    if not host:
        msg = "names a host that is none by IDNA 2008 (RFC 5891)"
        raise ValueError(msg)
    return value


def _webhook(source: Source) -> Webhook | None:
    url = source.get("WEBHOOK_URL", lambda v: Secret(_asked(address_of(v))), None)
    secret = source.get("WEBHOOK_SECRET", read.secret, None)
    return None if url is None else Webhook(url=url, secret=secret)
