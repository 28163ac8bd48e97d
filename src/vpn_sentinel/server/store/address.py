"""Parses the address of a PostgreSQL database, as libpq documents it: once, for the engine and for the driver.

https://www.postgresql.org/docs/current/libpq-connect.html, 34.1.1.2 (connection URIs) and 34.1.2 (parameters). Nothing
here imports a driver: settings are also read on machines without one.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final
from urllib.parse import unquote

from vpn_sentinel.domain.counted import counted
from vpn_sentinel.runtime.parsers import readable_file
from vpn_sentinel.runtime.pem import PairError, try_pair
from vpn_sentinel.runtime.urls import host_problem

SCHEMES: Final = ("postgresql", "postgres", "postgresql+asyncpg", "postgres+asyncpg")
SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
TARGET_SESSION_ATTRS: Final = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
_TLS_VERSIONS: Final = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_DEFAULT_PORT: Final = 5432
_DEFAULT_TIMEOUT_S: Final = 5.0
_MIN_TIMEOUT_S: Final = 2.0  # as libpq's
# Parameters about TLS, passed to the driver unchanged. The second tuple's name a file that must exist.
_TLS_PARAMETERS: Final = ("sslpassword", "ssl_min_protocol_version", "ssl_max_protocol_version", "sslnegotiation")
_TLS_FILE_PARAMETERS: Final = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
# Ignored: they tune a connection, or ask for what is done anyway.
_IGNORED_PARAMETERS: Final = frozenset(
    [
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "tcp_user_timeout",
        "sslcompression",
        "sslsni",
        "gssencmode",
        "client_encoding",
        "load_balance_hosts",
        "gssdelegation",
        "max_protocol_version",
        "min_protocol_version",
        "pool_timeout",
        "prepared_statement_cache_size",
        "statement_cache_size",
        "pgbouncer",
    ]
)
_MAX_PORT: Final = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresAddress:
    """`hosts` are tried in turn; an absolute path is a socket's folder; if empty, PGHOST or the driver decides.

    `timeout` is in seconds for each host. `tls` are libpq's parameters about TLS. `session` is target_session_attrs.
    `settings` go to the server unchanged. For None, libpq's variables decide (PGUSER, PGPASSWORD, …).
    """

    hosts: tuple[tuple[str, int], ...] = ()
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    passfile: str | None = None
    database: str | None = None
    timeout: float = _DEFAULT_TIMEOUT_S
    session: str = "any"
    tls: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    # Parameters that the address asks for and that have no effect here, to be logged.
    unsupported: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The hosts, for people."""
        return ", ".join(host for host, _ in self.hosts) or "the local socket"


def parse(url: str) -> PostgresAddress:
    """Raises ValueError with one line that does not repeat a password."""
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        msg = "takes sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME"
        raise ValueError(msg)
    if any(c.isspace() for c in rest.partition("?")[0]) or "#" in rest:
        msg = "write a space as %20 and # as %23 in the address"
        raise ValueError(msg)
    authority, _, query = rest.partition("?")
    authority, _, path = authority.partition("/")
    login, _, hosts = authority.rpartition("@")
    user, _, password = login.partition(":")
    given = _parameters(query)
    port = given.pop("port", "")
    ports = port.split(",") if port else []
    numbers, names = given.pop("hostaddr", ""), given.pop("host", "") or hosts
    found = _hosts(names or "," * numbers.count(","), ports, numbers.split(",") if numbers else [])
    # An empty value means the default (libpq).
    settings = {name: value for name in ("application_name", "options") if (value := given.pop(name, ""))}
    settings.setdefault("application_name", given.pop("fallback_application_name", "") or "vpn-sentinel")
    # This server writes: of several hosts it needs the one that takes writes, unless the address says otherwise.
    session = _one_of("target_session_attrs", given.pop("target_session_attrs", ""), TARGET_SESSION_ATTRS)
    tls = _tls(given)
    if numbers and names and "verify-full" in (tls.get("sslmode"), "verify-full" if "system" in tls.values() else ""):
        msg = "hostaddr in the address is what a certificate is compared with here: leave it out, or use verify-ca"
        raise ValueError(msg)
    address = PostgresAddress(
        hosts=found,
        user=given.pop("user", "") or _plain("the user", user) or None,
        password=given.pop("password", "") or _plain("the password", password) or None,
        passfile=given.pop("passfile", "") or None,
        database=given.pop("dbname", "") or given.pop("database", "") or _plain("the name", path) or None,
        timeout=_timeout(given.pop("connect_timeout", "")),
        session=session or ("read-write" if len(found) > 1 else "any"),
        tls=tls,
        settings=settings,
        unsupported=("channel_binding=require",) if given.pop("channel_binding", "") == "require" else (),
    )
    unknown = sorted(set(given) - _IGNORED_PARAMETERS)
    if unknown:
        msg = f"the parameter {unknown[0][:40]!r} of the address is not supported here"
        raise ValueError(msg)
    return address


def _parameters(query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in query.removesuffix("&").split("&") if query else ():
        name, equals, value = part.partition("=")
        if not equals or not name:
            msg = "what follows '?' in the address takes NAME=VALUE, joined by '&'"
            raise ValueError(msg)
        found[_plain("a parameter", name)] = _plain(name[:40], value)
    return found


def _plain(what: str, text: str) -> str:
    """`text` with its %-escapes decoded. As for libpq, '+' is a plus, and a '%' that begins no escape is kept."""
    try:
        found = unquote(text, errors="strict")
    except UnicodeDecodeError:
        msg = f"{what} in the address holds %-escapes that are not UTF-8"
        raise ValueError(msg) from None
    if "\0" in found:  # PostgreSQL's protocol ends each text with a NUL
        msg = f"{what} in the address holds %00, which no text there can hold"
        raise ValueError(msg)
    return found


def _hosts(listed: str, ports: list[str], numbers: list[str]) -> tuple[tuple[str, int], ...]:
    """Parses `a:1,[2001:db8::1]:2,/run/postgresql`; `ports` has one port for all hosts, or one for each, or none.

    `numbers` are the IP addresses to connect to instead of the names (libpq's hostaddr).
    """
    if not listed and not numbers:
        return (("localhost", _port(ports[0])),) if ports else ()
    names = listed.split(",")
    if len(ports) not in (0, 1, len(names)):
        msg = f"{counted(len(names), 'host')} and {counted(len(ports), 'port')} in the address do not match"
        raise ValueError(msg)
    if len(numbers) not in (0, len(names)):
        msg = f"{counted(len(names), 'host')} and {len(numbers)} of hostaddr in the address do not match"
        raise ValueError(msg)
    found = []
    for n, item in enumerate(names):
        default = ports[n] if len(ports) == len(names) else ports[0] if ports else ""
        host, port = _host(item)
        # A socket's folder is written as %2Frun%2Fpostgresql.
        host = numbers[n] if numbers else _plain("a host", host)
        if not host:
            msg = "a host in the address is empty"
            raise ValueError(msg)
        # A folder means a socket, and so does an abstract name (@, unix(7)); an IPv6 zone is left to the system.
        if host[0] not in "/@" and not _is_ipv6(host) and (problem := host_problem(host)):
            raise ValueError(problem)
        found.append((host, _port(port or default)))
    return tuple(found)


def _host(item: str) -> tuple[str, str]:
    if item.startswith("/"):
        return item, ""
    if item.startswith("["):
        host, closed, port = item[1:].partition("]")
        if not closed or not _is_ipv6(host) or (port and not port.startswith(":")):
            msg = "an IPv6 address in the address takes brackets: [2001:db8::1]:5432"
            raise ValueError(msg)
        return host, port[1:]
    if _is_ipv6(item):  # ?host= takes it without brackets
        return item, ""
    host, _, port = item.partition(":")
    return host, port


def _is_ipv6(text: str) -> bool:
    try:
        return ip_address(text.partition("%")[0]).version == 6
    except ValueError:
        return False


def _port(text: str) -> int:
    if not text:
        return _DEFAULT_PORT
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) <= _MAX_PORT:
        # This is often part of a password with an unescaped character, so its text is not repeated.
        msg = "a port in the address is no number from 1 to 65535 (write / : @ # of a password as %2F %3A %40 %23)"
        raise ValueError(msg)
    return int(text)


def _timeout(text: str) -> float:
    if not text:
        return _DEFAULT_TIMEOUT_S
    if not text.strip().lstrip("-").isdigit():
        msg = "connect_timeout in the address is no whole number of seconds"
        raise ValueError(msg)
    # Zero and less mean "for ever" to libpq; a server that waits for ever never reports the failure.
    seconds = int(text)
    return min(max(float(seconds), _MIN_TIMEOUT_S), 60.0) if seconds > 0 else _DEFAULT_TIMEOUT_S


def _tls(given: dict[str, str]) -> dict[str, str]:
    mode = given.pop("sslmode", "")
    other = given.pop("ssl", "")  # some providers and drivers write this instead
    mode = mode or {"true": "require", "1": "require", "false": "disable", "0": "disable"}.get(other, other)
    found = {"sslmode": mode} if _one_of("sslmode", mode, SSL_MODES) else {}
    for name in (*_TLS_PARAMETERS, *_TLS_FILE_PARAMETERS):
        if value := given.pop(name, ""):
            found[name] = value
    for name in _TLS_FILE_PARAMETERS:
        value = found.get(name, "")
        if not value or (name == "sslrootcert" and value == "system"):
            continue
        try:
            readable_file(value)
        except ValueError as e:
            msg = f"{name} in the address: {e}"
            raise ValueError(msg) from None
    for name in ("ssl_min_protocol_version", "ssl_max_protocol_version"):
        _one_of(name, found.get(name, ""), _TLS_VERSIONS)
    _one_of("sslnegotiation", found.get("sslnegotiation", ""), ("postgres", "direct"))
    _try_certificates(found)
    return found


def _try_certificates(tls: Mapping[str, str]) -> None:
    """Raises ValueError for a file without certificates, and for a key that does not belong to the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name in ("sslrootcert", "sslcrl"):
        if tls.get(name, "system") != "system":
            try:
                context.load_verify_locations(tls[name])
            except OSError:  # ssl.SSLError is one
                msg = f"{name} in the address: {tls[name]} holds none (PEM)"
                raise ValueError(msg) from None
    if "sslcert" in tls and "sslkey" in tls:
        try:
            try_pair(context, tls["sslcert"], tls["sslkey"], tls.get("sslpassword", ""))
        except PairError as e:
            msg = f"{'sslkey' if e.of_key else 'sslcert'} in the address: {e}"
            raise ValueError(msg) from None


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value and value not in allowed:
        msg = f"{name} in the address is not one of {', '.join(allowed)}"
        raise ValueError(msg)
    return value
