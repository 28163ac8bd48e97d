"""Checks of what the agent is told to do about trouble: whether it could."""

import ctypes
import os
import shutil
from pathlib import Path

from vpn_sentinel.agent.containment.containment import Mode
from vpn_sentinel.agent.containment.nft import LIBRARY
from vpn_sentinel.agent.doctor.check import Check, gap, ok
from vpn_sentinel.agent.doctor.ground import Ground
from vpn_sentinel.agent.doctor.machine import effective_capabilities, has_net_admin
from vpn_sentinel.agent.net.http import Client, HttpError


async def containment(ground: Ground) -> list[Check]:
    may = has_net_admin(effective_capabilities(Path("/proc/self/status")))
    return [about_containment(ground.read.reactions.contain, may=may, nftables=has_nftables())]


def has_nftables() -> bool:
    """Its library, or the program where an administrator's programs are."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return shutil.which("nft", path=os.pathsep.join(("/usr/sbin", "/sbin", os.defpath))) is not None
    return True


def about_containment(mode: Mode, *, may: bool, nftables: bool) -> Check:
    if mode is Mode.OFF:
        return ok("containment", "off", "a leak is told, and not stopped; VPN_SENTINEL_CONTAIN turns it on.")
    missing = [word for word, there in (("CAP_NET_ADMIN", may), ("nftables", nftables)) if not there]
    if not missing:
        return ok("containment", f"{mode.value}, and able to work")
    means = "a leak would not be stopped."
    return gap(
        "containment", f"{mode.value}, and {' and '.join(missing)} missing", means, f"provide {' and '.join(missing)}"
    )


async def remedies(ground: Ground) -> list[Check]:
    wanted = ground.read.reactions
    found = []
    if wanted.hook:
        found.append(about_hook(wanted.hook[0], runs=os.access(wanted.hook[0], os.X_OK)))
    if wanted.gluetun_restart:
        found.append(about_restart(configured=ground.read.agent.introspect.gluetun is not None))
    for name, url in (("qBittorrent", wanted.qbittorrent_url), ("Transmission", wanted.transmission_url)):
        if url is not None:
            found.append(about_torrents(name, url, await _trouble(ground.http, url)))
    return found or [ok("remedies", "none is configured", "the agent looks and tells, and does nothing.")]


async def _trouble(http: Client, url: str) -> str | None:
    try:
        await http.get(url, limit=2.0)  # any answer will do: it is there
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
