"""Checks of the tunnel: kill switch, home addresses, leak watch, exit addresses, and the VPN programs."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.doctor.check import Check, gap, ok, unknown
from vpn_sentinel.agent.doctor.context import DoctorContext
from vpn_sentinel.agent.introspect import gluetun as control
from vpn_sentinel.agent.introspect.wireguard import Device, DeviceError, read_device
from vpn_sentinel.agent.leakwatch.egress_map import EgressMap, egress_map
from vpn_sentinel.agent.leakwatch.meant import MeantOutside
from vpn_sentinel.agent.leakwatch.rules import PortRange
from vpn_sentinel.agent.net.endpoints import TCP, Endpoint
from vpn_sentinel.agent.net.http import HttpError
from vpn_sentinel.agent.net.packetsocket import packet_socket
from vpn_sentinel.domain.counted import counted
from vpn_sentinel.domain.judge import with_learned_home
from vpn_sentinel.domain.observation import Answer, Canary, Observation, Probe
from vpn_sentinel.domain.policy import IPAddress, Policy

_TCP_TABLES: Final = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
_WIREGUARD_KINDS: Final = ("wireguard", "amneziawg")
_TCP_LISTEN: Final = "0A"  # TCP_LISTEN of net/tcp_states.h, as proc(5) prints it


async def kill_switch(context: DoctorContext) -> list[Check]:
    seen = await context.observation.result()
    physical = context.survey.physical
    return [about_kill_switch(seen, context.survey.tunnel, physical.name if physical else None)]


def about_kill_switch(seen: Observation, tunnel: str | None, physical: str | None) -> Check:
    name = "kill switch"
    if tunnel is None or physical is None:
        return unknown(name, "not tested: it takes a tunnel and an uplink beside it")
    outside = [*seen.asked(Probe.PHYSICAL), *seen.asked(Probe.FIRST_HOP)]
    passed = [c for c in outside if c.answer in (Answer.ANSWERED, Answer.EXPIRED)]
    if passed:
        versions = sorted({c.family for c in passed})
        families = " and ".join(f"IPv{f}" for f in versions) + (" gets" if len(versions) == 1 else " get")
        fix = "let a firewall refuse all but the tunnel's own packets (gluetun and most VPN clients have a kill switch)"
        means = "when the tunnel goes away, traffic leaves outside it."
        return gap(name, f"open: {families} out by {physical}", means, fix)
    if any(c.answer is Answer.BLOCKED for c in outside):
        return ok(name, f"holds: this host refuses to send by {physical}")
    if any(c.answer in (Answer.LOST, Answer.UNREACHABLE) for c in outside):
        return ok(
            name, f"nothing that was sent by {physical} was answered", "a firewall drops it, or that uplink is down."
        )
    return unknown(name, f"sending by {physical} alone is not permitted here", "it takes CAP_NET_RAW.")


async def home(context: DoctorContext) -> list[Check]:
    policy = context.settings.agent.probes.policy
    seen = await context.observation.result()
    return [about_home(policy, with_learned_home(seen, policy))]


def about_home(declared: Policy, learned: Policy) -> Check:
    if declared.home_networks:
        return ok("home addresses", ", ".join(map(str, declared.home_networks)))
    if learned.home_networks:
        found = f"learned from beside the tunnel: {', '.join(map(str, learned.home_networks))}"
        return ok("home addresses", found, "they are learned again while the kill switch is open.")
    means = "an address is known as home's only when the server knows it, or is behind the same one."
    fix = "VPN_SENTINEL_HOME_NETWORKS=your public addresses, here or on the server"
    return gap("home addresses", "none declared here, and none can be learned", means, fix)


async def leak_watch(context: DoctorContext) -> list[Check]:
    if not context.settings.agent.probes.leak_watch:
        means = "packets that leave outside are not seen; routes and canaries are still watched."
        return [ok("leak watch", "off by VPN_SENTINEL_LEAK_WATCH=false", means)]
    if (refused := packet_socket()) is not None:
        return [
            gap(
                "leak watch",
                f"off: no packet socket ({refused})",
                "packets that leave outside are not seen.",
                "see CAP_NET_RAW",
            )
        ]
    if context.survey.tunnel is None or context.kernel is None:
        return [unknown("leak watch", "no tunnel is known here, so no interface can be watched as outside of it")]
    device = await _wireguard(context)
    peers = device.peers if isinstance(device, Device) else ()
    endpoints = (*context.settings.agent.probes.tunnel_endpoints, *(p.endpoint for p in peers if p.endpoint))
    probes = context.settings.agent.probes
    found = egress_map(
        context.survey, context.kernel, allowed=probes.policy.allowed_outside, resolvers=(), before=EgressMap()
    )
    watched = [i.name for i in found.interfaces if i.name not in probes.meant_outside.interfaces]
    return [about_leak_watch(watched, endpoints, recognized=found.can_tell_tunnel(endpoints))]


async def meant_outside(context: DoctorContext) -> list[Check]:
    return about_meant(context.settings.agent.probes.meant_outside)


def about_meant(meant: MeantOutside) -> list[Check]:
    """What VPN_SENTINEL_MEANT_OUTSIDE excludes from the leak watch; empty when it is not set."""
    parts = [f"answers of port {_port_text(p)}" for p in meant.published]
    parts += [f"what goes to port {_port_text(p)}" for p in meant.ports]
    parts += [f"what user {uid} sends" for uid in sorted(meant.users)]
    parts += [f"what leaves by {name}" for name in sorted(meant.interfaces)]
    if meant.only_users:
        parts.append(f"all but what user {', '.join(map(str, sorted(meant.only_users)))} sends")
    if not parts:
        return []
    return [ok("meant outside", "; ".join(parts), "that is neither reported as a leak nor blocked by containment.")]


def _port_text(ports: PortRange) -> str:
    numbers = str(ports.low) if ports.low == ports.high else f"{ports.low}-{ports.high}"
    return f"{numbers}/{'tcp' if ports.protocol == TCP else 'udp'}"


def about_leak_watch(watched: Sequence[str], endpoints: Sequence[Endpoint], *, recognized: bool) -> Check:
    if not watched:
        return unknown("leak watch", "no interface beside the tunnel to watch")
    where = ", ".join(watched)
    if endpoints:
        far = ", ".join(str(e) for e in dict.fromkeys(endpoints))
        return ok("leak watch", f"watches {where}; the tunnel's own packets go to {far}")
    if recognized:
        return ok("leak watch", f"watches {where}; the tunnel's own packets are known by their mark or route")
    means = "the tunnel's own packets are distinguished from leaks by their shape alone."
    fix = "VPN_SENTINEL_TUNNEL_ENDPOINTS=ADDRESS:PORT of the VPN server"
    return gap("leak watch", f"watches {where}; the tunnel's far end is not known", means, fix)


async def _wireguard(context: DoctorContext) -> Device | Exception | None:
    link = next((i for i in context.survey.interfaces or () if i.name == context.survey.tunnel), None)
    if link is None:
        return None
    try:
        return await read_device(link.name, kernel=link.kind == "wireguard")
    except (PermissionError, DeviceError) as e:
        return e


async def program(context: DoctorContext) -> list[Check]:
    """WireGuard by its device, OpenVPN by its management interface."""
    link = next((i for i in context.survey.interfaces or () if i.name == context.survey.tunnel), None)
    device = await _wireguard(context)
    found = (
        [about_wireguard(device, context.clock.wall())]
        if device is not None or (link and link.kind in _WIREGUARD_KINDS)
        else []
    )
    where = context.settings.agent.introspect.openvpn
    if where is not None:
        found.append(about_openvpn(where, management_trouble(where)))
    elif link is not None and not found:
        means = "canaries show whether the tunnel works; its program could say why it does not."
        found.append(
            unknown(
                "VPN program", f"no program to ask about {link.name}", means, "OpenVPN: VPN_SENTINEL_OPENVPN_MANAGEMENT"
            )
        )
    return found


def about_wireguard(device: Device | Exception | None, wall: float) -> Check:
    match device:
        case Device():
            claim = device.claim(wall)
            age = "never" if claim.handshake_age is None else f"{claim.handshake_age:.0f} s ago"
            peers = counted(len(device.peers), "peer")
            return ok("WireGuard", f"{peers}, far end {claim.endpoint or 'unknown'}, last handshake {age}")
        case PermissionError():
            return gap(
                "WireGuard",
                "found, but this user may not read its state",
                "its handshake and endpoint stay unknown.",
                "see CAP_NET_ADMIN",
            )
        case None:
            return gap(
                "WireGuard",
                "in the kernel, but the program `wg` is missing",
                "its handshake and endpoint stay unknown.",
                "install wireguard-tools",
            )
        case error:
            return unknown("WireGuard", f"found, but {error}")


def management_trouble(where: str) -> str | None:
    """Why OpenVPN's management interface cannot be reached, None when it listens.

    It is only looked up, not connected to: it takes one client at a time, which may be a running agent.
    """
    if where.startswith("/"):
        try:
            is_socket = stat.S_ISSOCK(Path(where).stat().st_mode)
        except OSError as e:
            return e.strerror or "cannot be reached"
        return None if is_socket and os.access(where, os.W_OK) else "is not a socket that this user may write to"
    port = int(where.rpartition(":")[2])
    return None if port in listening() else "nobody listens there"


def listening(tables: Sequence[Path] = _TCP_TABLES) -> set[int]:
    """TCP ports of this namespace with a listening socket (proc(5), /proc/net/tcp)."""
    found = set()
    for table in tables:
        try:
            rows = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        found |= {int(row.split()[1].rpartition(":")[2], 16) for row in rows if row.split()[3] == _TCP_LISTEN}
    return found


def about_openvpn(where: str, trouble: str | None) -> Check:
    if trouble is None:
        return ok("OpenVPN", f"its management interface listens at {where}")
    fix = f"start OpenVPN with `management`, or correct VPN_SENTINEL_OPENVPN_MANAGEMENT ({where})"
    return gap("OpenVPN", f"{where}: {trouble}", "OpenVPN's state stays unknown.", fix)


async def gluetun(context: DoctorContext) -> list[Check]:
    settings = context.settings.agent.introspect
    if settings.gluetun is None:
        return about_no_gluetun(here=await control.found_here(context.http))
    try:
        answer = await context.http.get(settings.gluetun + control.STATUS, limit=2.0, headers=settings.login.headers())
    except HttpError as e:
        return [about_gluetun(settings.gluetun, None, str(e))]
    return [about_gluetun(settings.gluetun, answer.status, "")]


def about_no_gluetun(*, here: bool) -> list[Check]:
    if not here:
        return []
    means = "its status, address and forwarded port are not read."
    return [gap("gluetun", "answers here, and is not configured", means, f"VPN_SENTINEL_GLUETUN_URL={control.CONTROL}")]


def about_gluetun(url: str, status: int | None, why: str) -> Check:
    if status == 200:
        return ok("gluetun", f"its control server answers at {url}")
    if status in (401, 403):
        fix = f"give {control.STATUS} a role in its auth/config.toml, and VPN_SENTINEL_GLUETUN_API_KEY"
        return gap("gluetun", f"{url} refuses the request (HTTP {status})", "its status and port are not read.", fix)
    found = f"{url}: {why or f'HTTP {status}'}"
    return gap(
        "gluetun", found, "its status and port are not read.", "check that gluetun runs, and VPN_SENTINEL_GLUETUN_URL"
    )


def exits(seen: Observation) -> list[IPAddress]:
    return [a for f in (4, 6) if (a := seen.exit(f)) is not None]


async def way_out(context: DoctorContext) -> list[Check]:
    seen = await context.observation.result()
    return [about_way_out(exits(seen), seen.asked(Probe.DEFAULT), context.settings.agent.probes.policy)]


def about_way_out(addresses: Sequence[IPAddress], asked: Sequence[Canary], policy: Policy) -> Check:
    if home := [a for a in addresses if any(a in network for network in policy.home_networks)]:
        found = f"traffic comes out at {' and '.join(map(str, home))}: home"
        return gap(
            "way out", found, "traffic leaves outside the tunnel now.", "start the VPN; `vpn-sentinel check` says more"
        )
    if addresses:
        return ok("way out", f"traffic comes out at {' and '.join(map(str, addresses))}")
    if asked and all(c.answer is Answer.BLOCKED for c in asked):
        return gap(
            "way out", "this host refuses to send", "the tunnel is down, and the kill switch holds.", "start the VPN"
        )
    means = "nothing that was sent came back: this host is offline, or its exit blocks DNS and HTTPS to 1.1.1.1."
    return gap("way out", "nobody answered", means, "check that the tunnel carries traffic: `vpn-sentinel check`")
