"""Whether the reactions that are configured (containment, hook, remedies) could work here."""

import ctypes
import os
import shutil
from pathlib import Path

from vpn_sentinel.agent.containment.containment import Mode
from vpn_sentinel.agent.containment.nft import LIBRARY
from vpn_sentinel.agent.doctor.check import Check, gap, ok
from vpn_sentinel.agent.doctor.context import DoctorContext
from vpn_sentinel.agent.doctor.machine import effective_capabilities, has_net_admin
from vpn_sentinel.agent.net.http import Client, HttpError


async def containment(context: DoctorContext) -> list[Check]:
    may = has_net_admin(effective_capabilities(Path("/proc/self/status")))
    return [about_containment(context.settings.reactions.contain, may=may, nftables=has_nftables())]


def has_nftables() -> bool:
    """Whether the library or the program `nft` is installed, also where /sbin is not in this user's PATH."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return shutil.which("nft", path=os.pathsep.join(("/usr/sbin", "/sbin", os.defpath))) is not None
    return True


def about_containment(mode: Mode, *, may: bool, nftables: bool) -> Check:
    if mode is Mode.OFF:
        return ok("containment", "off", "a leak is reported, and not stopped; VPN_SENTINEL_CONTAIN turns it on.")
    missing = [word for word, there in (("CAP_NET_ADMIN", may), ("nftables", nftables)) if not there]
    if not missing:
        return ok("containment", f"{mode.value}, and able to work")
    means = "a leak would not be stopped."
    return gap(
        "containment", f"{mode.value}, and {' and '.join(missing)} missing", means, f"provide {' and '.join(missing)}"
    )


async def remedies(context: DoctorContext) -> list[Check]:
    configured = context.settings.reactions
    found = []
    if configured.hook:
        found.append(about_hook(configured.hook[0], runs=os.access(configured.hook[0], os.X_OK)))
    if configured.gluetun_restart:
        found.append(about_restart(configured=context.settings.agent.introspect.gluetun is not None))
    for name, url in (("qBittorrent", configured.qbittorrent_url), ("Transmission", configured.transmission_url)):
        if url is not None:
            found.append(about_torrents(name, url, await _connection_error(context.http, url)))
    return found or [ok("remedies", "none is configured", "the agent watches and reports, and does nothing else.")]


async def _connection_error(http: Client, url: str) -> str | None:
    try:
        await http.get(url, limit=2.0)  # any answer shows that it is there
    except HttpError as e:
        return str(e)
    return None


def about_hook(program: str, *, runs: bool) -> Check:
    if runs:
        return ok("hook", program)
    return gap(
        "hook", f"{program} is missing or cannot be run", "it would not be called.", "chmod +x, or VPN_SENTINEL_HOOK"
    )


def about_restart(*, configured: bool) -> Check:
    if configured:
        return ok("gluetun restart", "configured")
    fix = "VPN_SENTINEL_GLUETUN_URL"
    return gap("gluetun restart", "wanted, and no control server is configured", "it would not be restarted.", fix)


def about_torrents(name: str, url: str, trouble: str | None) -> Check:
    if trouble is None:
        return ok(name, f"answers at {url}")
    return gap(name, f"{url}: {trouble}", "it would not be paused.", f"see that {name} runs, and its address")
