"""Checks of the machine: Python and system, capabilities, clock, the data folder, settings."""

import os
import platform
import pwd
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.doctor.check import Check, gap, ok, unknown
from vpn_sentinel.agent.doctor.context import DoctorContext, Greeting
from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.packetsocket import packet_socket
from vpn_sentinel.runtime import files

_NET_ADMIN, _NET_RAW = 12, 13  # linux/capability.h
_MAX_CLOCK_ERROR_S: Final = 2.0
_GRANT_CAPABILITIES: Final = (
    "in a container: `cap_add: [NET_RAW, NET_ADMIN]`; in systemd: `AmbientCapabilities=CAP_NET_RAW CAP_NET_ADMIN`"
)


async def system(_: DoctorContext) -> list[Check]:
    return [about_system(platform.system(), platform.release(), sys.version_info[:3])]


def about_system(system: str, release: str, python: tuple[int, ...]) -> Check:
    found = f"Python {'.'.join(map(str, python))} on {system} {release}"
    if python < (3, 11):
        return gap("system", found, "VPN Sentinel needs Python 3.11.", "install Python 3.11 or newer")
    if system != "Linux":
        return gap("system", found, "interfaces and routes are read by Linux's netlink.", "run the agent on Linux")
    return ok("system", found)


async def capabilities(_: DoctorContext) -> list[Check]:
    effective = effective_capabilities(Path("/proc/self/status"))
    who = [about_user(os.geteuid(), _user(os.geteuid())), *about_one_user(AS_USER.uid, AS_USER.refused_uid)]
    return [*who, *about_capabilities(effective, packet_socket())]


def effective_capabilities(status: Path) -> int | None:
    """CapEff of proc(5), None where it cannot be read."""
    try:
        lines = status.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), None)


def has_net_admin(effective: int | None) -> bool:
    return effective is not None and bool(effective >> _NET_ADMIN & 1)


def about_user(uid: int, name: str | None) -> Check:
    return ok("user", f"{name or 'no name'} (uid {uid})")


def about_one_user(uid: int | None, refused: int | None) -> list[Check]:
    """Whether probes can be sent as the one user whom the tunnel is for."""
    if refused is not None:
        return [
            gap(
                "tunnel of one user",
                f"for user {refused} alone, and this process may not send probes as that user",
                "where traffic leaves stays unknown.",
                f"run the agent as user {refused}, or give it CAP_SETUID",
            )
        ]
    if uid is None:
        return []
    return [ok("tunnel of one user", f"for user {uid} alone", "all probes are sent as that user.")]


def about_capabilities(effective: int | None, packet: str | None) -> list[Check]:
    raw = effective is not None and bool(effective >> _NET_RAW & 1)
    if packet is None:
        watch = ok(
            "CAP_NET_RAW", "a packet socket opens", "the leak watch can see packets that leave outside the tunnel."
        )
    else:
        why = f"it is there, but a packet socket is refused ({packet})" if raw else "missing"
        fix = "allow AF_PACKET in the sandbox (seccomp, RestrictAddressFamilies)" if raw else _GRANT_CAPABILITIES
        watch = gap("CAP_NET_RAW", why, "no leak watch: leaks are found by canaries alone, within seconds.", fix)
    if effective is None:
        return [watch, unknown("CAP_NET_ADMIN", "/proc/self/status cannot be read")]
    if has_net_admin(effective):
        return [watch, ok("CAP_NET_ADMIN", "held", "WireGuard's state can be read, and containment can work.")]
    means = "WireGuard's state (endpoint, handshake) cannot be read, and containment cannot work."
    return [watch, gap("CAP_NET_ADMIN", "missing", means, _GRANT_CAPABILITIES)]


def _user(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


async def clock(context: DoctorContext) -> list[Check]:
    return [about_clock(await context.greetings.result())]


def about_clock(greetings: Sequence[Greeting]) -> Check:
    answered = next((g for g in greetings if g.date is not None), None)
    if answered is None or answered.date is None:
        return unknown(
            "clock", "no server to compare it with", "reports carry ages, so a wrong clock does not change their times."
        )
    # An HTTP date has whole seconds, rounded down.
    resolution_s = 0.0 if answered.welcome else 1.0
    # The server read its clock between `sent_at` and `received_at`: only what lies outside of that is an error.
    behind, ahead = answered.date - answered.received_at, answered.date + resolution_s - answered.sent_at
    error_s = behind if behind > 0 else ahead if ahead < 0 else 0.0
    if abs(error_s) <= _MAX_CLOCK_ERROR_S:
        return ok("clock", "agrees with the server's")
    direction = "behind" if error_s > 0 else "ahead of"
    means = "reports carry ages and stay right, but certificates and the times in logs depend on this clock."
    return gap(
        "clock",
        f"{abs(error_s):.0f} s {direction} the server's",
        means,
        "let a time service run (systemd-timesyncd, chrony)",
    )


async def data_folder(context: DoctorContext) -> list[Check]:
    folder = context.settings.agent.data_dir
    if folder.is_dir():
        try:
            files.try_folder(folder)
        except OSError as e:
            return [about_folder(folder, e.strerror or "refused", there=True)]
        return [about_folder(folder, None, there=True)]
    try:
        parent = next(p for p in folder.absolute().parents if p.exists())
    except (OSError, StopIteration):
        return [about_folder(folder, "cannot be reached", there=False)]
    usable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    return [about_folder(folder, None if usable else f"{parent} cannot be written", there=False)]


def about_folder(folder: Path, trouble: str | None, *, there: bool) -> Check:
    if trouble is None:
        return ok("data folder", f"{folder} {'can be written' if there else 'can be made'}")
    fix = "make it writable for this user, or set VPN_SENTINEL_DATA_DIR"
    return gap(
        "data folder", f"{folder}: {trouble}", "the agent does not start: it has no place to store reports.", fix
    )


async def settings(context: DoctorContext) -> list[Check]:
    return about_settings(context.settings.troubles, context.settings.idle)


def about_settings(troubles: Sequence[str], idle: Sequence[str] = ()) -> list[Check]:
    if not troubles and not idle:
        return [ok("settings", "all can be used")]
    fix = "see docs/reference/settings.md for what it takes"
    means = "the agent does not start, or does not know this name."
    return [
        *(gap("settings", trouble, means, fix) for trouble in troubles),
        *(gap("settings", line, "the agent starts without it.", "set what it needs, or leave it out") for line in idle),
    ]
