"""The agent's settings: read once, checked whole, frozen."""

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.geo.store import FOLDER
from vpn_sentinel.agent.introspect.settings import IntrospectSettings
from vpn_sentinel.agent.leakwatch.meant import Meant, parse_meant
from vpn_sentinel.agent.net.endpoints import Endpoint, parse_endpoint
from vpn_sentinel.agent.net.urls import address_in, is_insecure
from vpn_sentinel.agent.probes.trace import TRACE_URL
from vpn_sentinel.agent.remedies.settings import ReactionSettings
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.tunnel import site_name, tunnel_name
from vpn_sentinel.runtime import settings as s
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import SettingError, Source

_NONE: Final[tuple[str, ...]] = ()
# How an entry begins, in any case; names behind it keep theirs.
_KEYWORDS: Final = re.compile(
    r"(?:^|;)\s*(?:published|port|only\s+user|user|interface)(?=\s)", re.IGNORECASE | re.MULTILINE
)
_NO_ENDPOINTS: Final[tuple[Endpoint, ...]] = ()
_SERVICES: Final = ("auto", "ipinfo.io", "ip-api.com", "ipwho.is")
# The same services as people and the replaced agent write them.
_SPELLINGS: Final = {
    "ipinfo": "ipinfo.io",
    "ipapi": "ip-api.com",
    "ip-api": "ip-api.com",
    "ipapi.com": "ip-api.com",
    "ipwhois": "ipwho.is",
    "ipwhois.io": "ipwho.is",
    "ipwhois.app": "ipwho.is",
    "ipwho": "ipwho.is",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings:
    """What one round needs; `check` reads no more than this. `timeout` is seconds for one HTTP request."""

    geolocation_service: str
    ipinfo_url: str
    ipapi_url: str
    ipwhois_url: str
    trace_url: str
    ca_file: str | None
    databases: tuple[str, ...]
    geo_folder: Path
    tunnel_interface: str | None
    tunnel_endpoints: tuple[Endpoint, ...]
    leak_watch: bool
    meant_outside: Meant
    timeout: float
    policy: Policy

    @classmethod
    def read(cls, source: Source) -> "ProbeSettings":
        """Raises SettingError naming the setting that cannot be used."""
        ca = source.get("CA_FILE", s.authorities, None)
        replaced_ca = source.get("TLS_CERT_PATH", s.authorities, None)
        base = Policy()
        return cls(
            geolocation_service=source.get("GEOLOCATION_SERVICE", _service, "auto"),
            ipinfo_url=source.get("IPINFO_URL", s.url, "https://ipinfo.io"),
            ipapi_url=source.get("IPAPI_URL", s.url, "http://ip-api.com"),
            ipwhois_url=source.get("IPWHOIS_URL", s.url, "https://ipwho.is"),
            trace_url=source.get("TRACE_URL", s.url, TRACE_URL),
            ca_file=str(ca or replaced_ca) if ca or replaced_ca else None,
            databases=source.get("GEO_DB", _files, _NONE),
            geo_folder=source.get("DATA_DIR", Path, Path(s.default_data_dir())) / FOLDER,
            tunnel_interface=source.get("TUNNEL_INTERFACE", _interface, None),
            tunnel_endpoints=source.get("TUNNEL_ENDPOINTS", _endpoints, _NO_ENDPOINTS),
            leak_watch=source.get("LEAK_WATCH", s.boolean, True),
            meant_outside=source.get("MEANT_OUTSIDE", _meant, Meant()),
            timeout=source.get("TIMEOUT", s.number(1, 300, "seconds"), 10.0),
            policy=Policy(
                home_networks=source.get("HOME_NETWORKS", s.home_networks, base.home_networks),
                expected_countries=source.get("EXPECTED_COUNTRIES", s.countries, base.expected_countries),
                allowed_resolvers=source.get("ALLOWED_RESOLVERS", s.networks, base.allowed_resolvers),
                allowed_outside=source.get("ALLOWED_OUTSIDE", s.networks, base.allowed_outside),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """`urls`: the first is preferred. `interval` and `pulse` are seconds. `health_port` is on `health_host`.

    `role` is "tunnel" or "reference", `site` where it runs, "" for none.
    """

    urls: tuple[str, ...]
    api_path: str
    api_key: Secret
    client_id: str
    role: str
    site: str
    interval: float
    pulse: float
    allow_insecure: bool
    debug: bool
    log_file: str | None
    health_host: str
    health_port: int
    data_dir: Path
    reactions: ReactionSettings
    probes: ProbeSettings
    introspect: IntrospectSettings

    @classmethod
    def read(cls, source: Source, *, hostname: str | None = None) -> "AgentSettings":
        """Raises SettingError naming the setting that cannot be used, or that is missing."""
        urls = source.get("URL", s.urls, _NONE)
        if not urls:
            raise SettingError("VPN_SENTINEL_URL", "is not set: the server's address, e.g. https://sentinel.example")
        api_path = source.get("API_PATH", s.path, "/api/v1")
        urls = tuple(url.removesuffix(api_path) for url in urls)  # as people copy it from the API's documents
        api_key = source.get("API_KEY", s.secret, Secret(""))
        if not api_key.reveal().isascii() or not api_key.reveal().isprintable():
            raise SettingError("VPN_SENTINEL_API_KEY", "takes printable ASCII characters")
        allow_insecure = source.get("ALLOW_INSECURE", s.boolean, False)
        for url in urls:
            if not allow_insecure and is_insecure(url):
                raise SettingError(
                    "VPN_SENTINEL_URL",
                    f"{url} would carry the key in clear; use https, or VPN_SENTINEL_ALLOW_INSECURE=true if you must",
                )
        role = source.get("ROLE", s.one_of("tunnel", "reference"), "tunnel")
        site = source.get("SITE", site_name, "")
        if role == "reference" and not site:
            raise SettingError("VPN_SENTINEL_SITE", "is not set: a reference agent names the site that it stands for")
        return cls(
            urls=urls,
            api_path=api_path,
            api_key=api_key,
            client_id=source.get("CLIENT_ID", tunnel_name, valid_name(hostname or socket.gethostname())),
            role=role,
            site=site,
            interval=source.get("INTERVAL", s.number(1, 3600, "seconds"), 30.0),
            pulse=source.get("PULSE_SECONDS", s.number(0.2, 3600, "seconds"), 1.0),
            allow_insecure=allow_insecure,
            debug=source.get("DEBUG", s.boolean, False),
            log_file=source.get("LOG_FILE", s.text, None),
            health_host=source.get("HEALTH_HOST", _own_address, "127.0.0.1"),
            health_port=source.get("HEALTH_PORT", s.port, 8082),
            data_dir=source.get("DATA_DIR", Path, Path(s.default_data_dir())),
            reactions=ReactionSettings.read(source),
            probes=ProbeSettings.read(source),
            introspect=IntrospectSettings.read(source, insecure=lambda url: not allow_insecure and is_insecure(url)),
        )


def valid_name(hostname: str) -> str:
    """The nearest valid tunnel name to a host's name."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in hostname)[:64].lstrip("._-")
    return kept or "agent"


def _service(value: str) -> str:
    name = value.strip().lower().removeprefix("https://").removeprefix("http://").removeprefix("www.").rstrip("/")
    return s.one_of(*_SERVICES)(_SPELLINGS.get(name, name))


def _own_address(value: str) -> str:
    """An address to listen on. A name is not looked up: who answers may be at the other end of the tunnel."""
    if value.lower() == "localhost":
        return "127.0.0.1"
    address = address_in(s.listening_host(value))
    if address is None:
        msg = f"{value!r} is neither an address nor localhost"
        raise ValueError(msg)
    return str(address)


def _meant(value: str) -> Meant:
    return parse_meant(_KEYWORDS.sub(lambda found: found[0].lower(), value))


def _interface(value: str) -> str:
    if len(value.replace(",", " ").split()) > 1:  # legal to the kernel with a comma, and surely meant as a list
        msg = f"{value!r} is more than one name: an agent watches one tunnel, and another takes an agent of its own"
        raise ValueError(msg)
    # dev_valid_name() of net/core/dev.c: IFNAMSIZ is 16 bytes, the last of them a zero.
    if len(value.encode()) > 15 or value in (".", "..") or any(c in "/:," or c.isspace() for c in value):
        msg = f"{value!r} is not the name of a network interface: at most 15 bytes, without '/', ':', ',' and spaces"
        raise ValueError(msg)
    return value


def _endpoints(value: str) -> tuple[Endpoint, ...]:
    return tuple(parse_endpoint(part) for part in s.listed(value))


def _files(value: str) -> tuple[str, ...]:
    return tuple(str(s.readable_file(part)) for part in s.words(value))
