"""The agent's settings: read once, all checked, frozen."""

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.introspect.settings import WITNESSES, IntrospectSettings
from vpn_sentinel.agent.leakwatch.meant import MeantOutside, parse_meant
from vpn_sentinel.agent.net.endpoints import Endpoint, parse_endpoint
from vpn_sentinel.agent.net.urls import address_in, is_insecure
from vpn_sentinel.agent.probes.trace import TRACE_URL
from vpn_sentinel.agent.remedies.settings import REACTIONS, ReactionSettings
from vpn_sentinel.agent.role import NOT_FOR_REFERENCE, REFERENCE, TUNNEL
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.tunnel import site_name, tunnel_name
from vpn_sentinel.runtime import parsers as p
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import Section, SettingError, Source, fill, of
from vpn_sentinel.wire.settings import (
    API_PATH,
    DEBUG,
    EVERYWHERE,
    LOG_FILE,
    POLICY,
    read_data_dir,
    read_policy,
)

# How an entry begins, in upper or lower case; the case of names after it is kept.
GEO_FOLDER: Final = "geo"  # below DATA_DIR
_MEANT_KEYWORDS: Final = re.compile(
    r"(?:^|;)\s*(?:published|port|only\s+user|user|interface)(?=\s)", re.IGNORECASE | re.MULTILINE
)
_NO_ENDPOINTS: Final[tuple[Endpoint, ...]] = ()
_GEO_SERVICES: Final = ("auto", "ipinfo.io", "ip-api.com", "ipwho.is")
# The same services as people and the replaced agent write them.
_GEO_SPELLINGS: Final = {
    "ipinfo": "ipinfo.io",
    "ipapi": "ip-api.com",
    "ip-api": "ip-api.com",
    "ipapi.com": "ip-api.com",
    "ipwhois": "ipwho.is",
    "ipwhois.io": "ipwho.is",
    "ipwhois.app": "ipwho.is",
    "ipwho": "ipwho.is",
}


def valid_name(hostname: str) -> str:
    """The valid tunnel name that is nearest to a host name."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in hostname)[:64].lstrip("._-")
    return kept or "agent"


def _service(value: str) -> str:
    name = value.strip().lower().removeprefix("https://").removeprefix("http://").removeprefix("www.").rstrip("/")
    return p.one_of(*_GEO_SERVICES)(_GEO_SPELLINGS.get(name, name))


def _own_address(value: str) -> str:
    """An address to listen on. A host name is not resolved: the resolver may be at the other end of the tunnel."""
    if value.lower() == "localhost":
        return "127.0.0.1"
    address = address_in(p.listening_host(value))
    if address is None:
        msg = f"{value!r} is neither an address nor localhost"
        raise ValueError(msg)
    return str(address)


def _meant(value: str) -> MeantOutside:
    return parse_meant(_MEANT_KEYWORDS.sub(lambda found: found[0].lower(), value))


def _interface(value: str) -> str:
    if len(value.replace(",", " ").split()) > 1:  # the kernel allows a comma in a name, but a list is meant
        msg = f"{value!r} is more than one name: an agent watches one tunnel, and another takes an agent of its own"
        raise ValueError(msg)
    # dev_valid_name() of net/core/dev.c: IFNAMSIZ is 16 bytes, the last of them a zero.
    if len(value.encode()) > 15 or value in (".", "..") or any(c in "/:," or c.isspace() for c in value):
        msg = f"{value!r} is not the name of a network interface: at most 15 bytes, without '/', ':', ',' and spaces"
        raise ValueError(msg)
    return value


def _endpoints(value: str) -> tuple[Endpoint, ...]:
    return tuple(parse_endpoint(part) for part in p.listed(value))


def _files(value: str) -> tuple[str, ...]:
    return tuple(str(p.readable_file(part)) for part in p.words(value))


AGENT: Final = Section("Agent", read_by=("agent",))
URL: Final = AGENT.add(
    "URL",
    p.urls,
    p.NO_TEXTS,
    "the server's address, such as `https://sentinel.example:5000`, with or without the API's path "
    "(`VPN_SENTINEL_API_PATH`). Several, separated by commas: the first is preferred, the others are used when it does "
    "not answer",
    default_text="needed",
    stand_in="http://127.0.0.1:9",  # port 9, discard
)
CLIENT_ID: Final = AGENT.add(
    "CLIENT_ID",
    tunnel_name,
    None,
    "the tunnel's name: letters, digits, `.`, `_`, `-`, at most 100",
    default_text="the host's name",
)
ROLE: Final = AGENT.add(
    "ROLE",
    p.one_of(TUNNEL, REFERENCE),
    TUNNEL,
    "`reference`: this agent runs outside the tunnels of its site, and observes the home connection",
)
SITE: Final = AGENT.add(
    "SITE",
    site_name,
    "",
    "the home where this runs; its agents share the name. Required for a reference agent: its reports affect all "
    "tunnels of the site, so it needs a shared key, or a token with the site's name",
    stand_in="unnamed",
)
ALLOW_INSECURE: Final = AGENT.add(
    "ALLOW_INSECURE",
    p.boolean,
    False,
    "true sends the key over plain HTTP to public addresses too",
    read_by=("agent", "geo"),
)

_ROUNDS: Final = ("agent", "check")
TUNNEL_SECTION: Final = Section("The tunnel, and what may leave beside it", read_by=_ROUNDS)

PLACES: Final = Section("Certificates, places and outside services", read_by=_ROUNDS)
CA_FILE: Final = PLACES.add(
    "CA_FILE",
    p.authorities,
    None,
    "further certificate authorities, PEM, in addition to the system's",
    read_by=("agent", "check", "geo"),
    old_names=("TLS_CERT_PATH",),
)
GEO_DB: Final = PLACES.add(
    "GEO_DB",
    _files,
    p.NO_TEXTS,
    "database files in MaxMind's format (`.mmdb`), asked before any service; a replaced file is loaded within a minute",
    default_text="what `geo update` installed",
    read_by=("agent", "check", "geo"),
)

# All sections that an agent reads; `check` reads them, too.
SECTIONS: Final = (AGENT, TUNNEL_SECTION, POLICY, WITNESSES, PLACES, REACTIONS, EVERYWHERE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings:
    """What one round needs; `check` reads no more than this. `timeout` is seconds for one HTTP request."""

    tunnel_interface: str | None = TUNNEL_SECTION.field(
        "TUNNEL_INTERFACE",
        _interface,
        None,
        "the tunnel's interface, one name: another tunnel needs an agent of its own. Where nothing else shows that it "
        "is a tunnel, the verdict rests on this setting, and `tunnel_unseen` says so. If it names the uplink beneath a "
        "tunnel that is found here, that tunnel is watched, and log, `check` and `doctor` say so",
        default_text="found",
        idle=(NOT_FOR_REFERENCE,),
    )
    tunnel_endpoints: tuple[Endpoint, ...] = TUNNEL_SECTION.field(
        "TUNNEL_ENDPOINTS",
        _endpoints,
        _NO_ENDPOINTS,
        "the VPN servers to which the tunnel's own packets go: `ADDRESS:PORT/udp` or `/tcp`, `[IPV6]:PORT/udp`. Needed "
        "where nothing else shows them: no WireGuard, no rule with a mark, no route to the server, no management "
        "socket",
        default_text="found",
        idle=(NOT_FOR_REFERENCE,),
    )
    meant_outside: MeantOutside = TUNNEL_SECTION.field(
        "MEANT_OUTSIDE",
        _meant,
        MeantOutside(),
        "what is [meant to leave beside the tunnel](../how-to/meant-outside.md), entries separated by `;`: `published "
        "8000/tcp; port 123/udp; user backup; only user debian-transmission; interface eth1`. Users are names or "
        "numbers. Most answers of a published port to clients are recognized without an entry; not those in a session "
        "with a container that began before the agent, if the published port is 32768 or higher, or if the client's "
        "port is lower than that (and the published one is 1024 or higher). Networks go into "
        "`VPN_SENTINEL_ALLOWED_OUTSIDE`",
        default_text="none",
        idle=(NOT_FOR_REFERENCE,),
    )
    leak_watch: bool = TUNNEL_SECTION.field(
        "LEAK_WATCH",
        p.boolean,
        True,
        "`false` turns the leak watch off: no packets are watched, only routes and canaries",
    )
    policy: Policy
    ca_file: str | None
    geo_folder: Path
    databases: tuple[str, ...] = of(GEO_DB)
    geolocation_service: str = PLACES.field(
        "GEOLOCATION_SERVICE",
        _service,
        "auto",
        "`auto`, `ipinfo.io`, `ip-api.com` or `ipwho.is`; also as `ipinfo`, `ip-api`, `ipwhois.app` …",
    )
    ipinfo_url: str = PLACES.field("IPINFO_URL", p.url, "https://ipinfo.io", "base address")
    ipapi_url: str = PLACES.field(
        "IPAPI_URL", p.url, "http://ip-api.com", "base address; its free service has no HTTPS"
    )
    ipwhois_url: str = PLACES.field("IPWHOIS_URL", p.url, "https://ipwho.is", "base address")
    trace_url: str = PLACES.field("TRACE_URL", p.url, TRACE_URL, "base address of Cloudflare's trace")
    timeout: float = PLACES.field(
        "TIMEOUT",
        p.number(1, 300, "seconds"),
        10.0,
        "seconds for a request to a geolocation service; at most 5 (`check`: 4), higher values count as that",
    )

    @classmethod
    def read(cls, source: Source) -> "ProbeSettings":
        """Raises SettingError that names the setting that cannot be used."""
        ca = source.get(CA_FILE)
        return fill(
            cls,
            source,
            ca_file=None if ca is None else str(ca),
            geo_folder=read_data_dir(source) / GEO_FOLDER,
            policy=read_policy(source, "agent"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """`urls`: the first is preferred. `interval` and `pulse` are seconds. `health_port` is on `health_host`.

    `role` is "tunnel" or "reference", `site` where it runs, "" for none.
    """

    urls: tuple[str, ...]
    api_path: str = of(API_PATH)
    api_key: Secret = AGENT.field(
        "API_KEY", p.header, Secret(""), "a token of `token create NAME`, or a shared key", default_text="needed"
    )
    client_id: str
    role: str = of(ROLE)
    site: str = of(SITE)
    allow_insecure: bool = of(ALLOW_INSECURE)
    interval: float = AGENT.field(
        "INTERVAL", p.number(1, 3600, "seconds"), 30.0, "seconds between full rounds, 1 to 3600"
    )
    pulse: float = AGENT.field(
        "PULSE_SECONDS",
        p.number(0.2, 3600, "seconds"),
        1.0,
        "seconds between two pulses to our own server, 92 bytes each way; where pulses do not reach it, canaries go to "
        "a public service, 5 s apart or more",
    )
    health_host: str = AGENT.field(
        "HEALTH_HOST", _own_address, "127.0.0.1", "the address to listen on for the agent's own health, or `localhost`"
    )
    health_port: int = AGENT.field("HEALTH_PORT", p.port, 8082, "the port of the agent's own health")
    data_dir: Path
    reactions: ReactionSettings
    probes: ProbeSettings
    introspect: IntrospectSettings
    debug: bool = of(DEBUG)
    log_file: str | None = of(LOG_FILE)

    @classmethod
    def read(cls, source: Source, *, hostname: str | None = None) -> "AgentSettings":
        """Raises SettingError that names the setting that cannot be used, or is missing."""
        urls = source.get(URL)
        if not urls:
            raise SettingError(URL.key, "is not set: the server's address, e.g. https://sentinel.example")
        api_path = source.get(API_PATH)
        urls = tuple(url.removesuffix(api_path) for url in urls)  # people copy it so from the API's documentation
        allow_insecure = source.get(ALLOW_INSECURE)
        for url in urls:
            if not allow_insecure and is_insecure(url):
                problem = f"{url} would carry the key in clear; use https, or {ALLOW_INSECURE.key}=true if you must"
                raise SettingError(URL.key, problem)
        if source.get(ROLE) == REFERENCE and not source.get(SITE):
            raise SettingError(SITE.key, "is not set: a reference agent names its site")
        return fill(
            cls,
            source,
            urls=urls,
            client_id=source.get(CLIENT_ID) or valid_name(hostname or socket.gethostname()),
            data_dir=read_data_dir(source),
            reactions=ReactionSettings.read(source),
            probes=ProbeSettings.read(source),
            introspect=IntrospectSettings.read(source, insecure=lambda url: not allow_insecure and is_insecure(url)),
        )
