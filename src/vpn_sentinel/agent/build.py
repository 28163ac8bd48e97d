"""Make what both agents and `check` need from the settings. Imports neither the spool nor the uplink."""

import logging

from vpn_sentinel.agent.geo.databases import Databases
from vpn_sentinel.agent.net.http import Client, tls_context
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.net.urls import split
from vpn_sentinel.agent.probes.placing import Service, services
from vpn_sentinel.agent.probes.portal import portal
from vpn_sentinel.agent.rounds.side_probes import Portal
from vpn_sentinel.agent.settings import ProbeSettings
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError

log = logging.getLogger(__name__)


def open_kernel() -> Netlink | None:
    try:
        return Netlink()
    except OSError as e:
        log.warning("no netlink here: interfaces and paths stay unknown", extra={"reason": e.strerror})
        return None


def http_client(settings: ProbeSettings, names: HostResolver) -> Client:
    """Raises SettingError when the CA file holds no certificates."""
    try:
        return Client(names=names, tls=tls_context(settings.ca_file))
    except OSError as e:
        raise SettingError("VPN_SENTINEL_CA_FILE", f"{settings.ca_file} holds no usable certificates") from e


def chosen_services(settings: ProbeSettings) -> tuple[Service, ...]:
    """All geolocation services, or the configured one; Cloudflare's trace is asked for the exit in any case."""
    found = services(settings.ipinfo_url, settings.ipapi_url, settings.ipwhois_url, settings.trace_url)
    chosen = settings.geolocation_service
    return found if chosen == "auto" else tuple(s for s in found if s.name in (chosen, "cloudflare"))


def open_databases(settings: ProbeSettings, clock: Clock) -> Databases:
    """The configured databases, else those that `geo update` installed. Raises SettingError."""
    try:
        return Databases(clock, files=settings.databases, folder=settings.geo_folder)
    except ValueError as e:
        raise SettingError("VPN_SENTINEL_GEO_DB", str(e)) from e


def portal_beside(settings: ProbeSettings, names: HostResolver) -> Portal:
    """A function that searches for a captive portal: at the trace service's host, without TLS."""
    host = split(settings.trace_url).host

    async def ask(device: str) -> bool | None:
        address = next(iter(names.known(host)), None)
        return None if address is None else await portal(address, host, device)

    return ask
