"""A site: a home with its router, and a client host whose traffic goes through a VPN."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

from lab import dscp
from lab.client import Control
from lab.faults import Faults
from lab.gluetun import Gluetun
from lab.nodes import Node, Process, Response, import_path, until
from lab.plan import CLOUDFLARE, CLOUDFLARE6, ISP_RESOLVER, OPENDNS, PROVIDERS, HomePlan
from lab.rules import MARK, Line, host, router_filter, router_nat
from lab.tunnels import FWMARK, Client, OpenVpnClient, WireGuardClient
from lab.uplinks import Uplink, uplink

_LISTENS: dict[str, tuple[int, float, str]] = {
    "portal": (8443, 10, "tcp"),
    "adblock": (53, 10, "udp"),
    "deny": (53, 10, "udp"),
}
"""What some helpers listen on: port, seconds of patience, protocol."""
_OUTSIDE = 100
"""Routing table whose default route is eth0, whatever the VPN does with the main table."""


@dataclass(frozen=True)
class Site:
    """What a home shall look like. Every option has its ordinary value as default."""

    name: str
    _: KW_ONLY
    vpn: str | None = "wireguard"
    """One of `plan.KINDS`, or None."""
    provider: str = "nl"
    """nl, ch or us."""
    kill_switch: bool = True
    kill_switch_lan: bool = False
    kill_switch_udp_only: bool = False
    """The kill switch lets the LAN through, as gluetun's does."""
    ipv6: str = "tunnel"
    """tunnel (through it), outside (beside it), dropped (there, but a firewall drops it), none (not at all)."""
    resolver: str | Sequence[str] = "provider"
    """provider, isp, public (1.1.1.1), or addresses."""
    keepalive: int = 25
    """WireGuard's persistent keepalive, seconds; 0 for none."""
    lan_server: bool = False
    """The server has a second leg on this home's LAN."""
    reference: bool = False
    """A second host on the LAN without a VPN: `home.reference`."""
    uplink: str = "lan"
    """lan, docker, two, bare, rootless or ppp: see `uplinks.py`. Only lan, two and bare have the home's IPv6."""
    cgnat: bool = False
    """The line has no public address of its own: the ISP translates once more (RFC 6598)."""
    mtu: int = 0
    """Of the home's line, bytes; 0 for Ethernet's."""
    device: str | None = None
    """The tunnel's device, where it is not called as usual (wg-quick only)."""
    user: int | None = None
    """Only this user's programs go by the VPN (WireGuard); the others are meant to go out beside it."""
    other: str | None = None
    """A second kind of tunnel to the same provider, which `switch_protocol` goes over to."""
    standby: str | None = None
    """The provider of a second WireGuard, which takes over when the first tunnel is gone."""
    standby_waits: bool = False
    """It is not up before `fail_over` brings it up."""
    next_server: bool = False
    """OpenVPN has a second server in its list, which `move_server` goes over to; WireGuard needs none."""

    def __post_init__(self) -> None:
        if self.device and self.vpn != "wg-quick":
            raise ValueError("only wg-quick takes another name for its device")
        if self.uplink == "bare" and self.vpn not in ("wireguard", "wg-quick"):
            raise ValueError("the other kinds look for a default route when they connect: bare takes WireGuard")
        if self.uplink in ("rootless", "ppp", "docker") and (self.lan_server or self.kill_switch_lan):
            raise ValueError(f"there is no LAN beside the host where the uplink is {self.uplink}")
        if self.standby == self.provider:
            raise ValueError("a provider knows one tunnel of a home: what stands by takes another one")

    def line(self, number: int) -> Line:
        plan = HomePlan(number)
        provider = PROVIDERS[self.provider] if self.vpn else None
        named = {"isp": ISP_RESOLVER, "public": CLOUDFLARE}
        if provider is not None:
            named["provider"] = provider.resolver4
        else:
            named["provider"] = ISP_RESOLVER
        servers = (named[self.resolver],) if isinstance(self.resolver, str) else tuple(self.resolver)
        return Line(
            plan=plan,
            provider=provider,
            vpn=self.vpn,
            ipv6=self.ipv6,
            kill_switch=self.kill_switch,
            kill_switch_lan=self.kill_switch_lan,
            kill_switch_udp_only=self.kill_switch_udp_only,
            home4=plan.wan4,
            device=self.device,
            uplink=self.uplink,
            cgnat=self.cgnat,
            vpn_uid=self.user,
            standby=PROVIDERS[self.standby] if self.standby else None,
            standby_tunnel="deleted" if self.standby_waits else "up",
            resolvers=servers,
        )


class Home(Faults):
    """A running site. `run`, `spawn` and `http` act on the client host, where the tunnel is."""

    def __init__(
        self,
        site: Site,
        line: Line,
        host_node: Node,
        router: Node,
        isp: Node,
        push: Callable[[Home, Line | None], None],
    ) -> None:
        self.site, self.name, self.other = site, site.name, site.other
        self.host, self.router, self._isp = host_node, router, isp
        self.line, self._healthy = line, line
        self.clients: dict[str, Client] = {}
        self.standby: Client | None = None
        self.reference: Node | None = None
        self.machine: Node | None = None
        self.uplink: Uplink = uplink(site.uplink, line.plan)
        self._push = push
        self._now: Line | None = None
        self._helpers: dict[str, Process] = {}
        self._line_process: Process | None = None
        self.portal_files: tuple[Path, Path] | None = None

    # Facts

    @property
    def client(self) -> Client | None:
        """The tunnel's end here: of the kind that is in use now."""
        return None if self.line.vpn is None else self.clients[self.line.vpn]

    @property
    def _six(self) -> bool:
        """Whether the host has an IPv6 address of the home's."""
        return self.site.ipv6 != "none" and self.uplink.ipv6

    @property
    def vpn_interface(self) -> str | None:
        """wg0 or tun0."""
        return self.line.interface

    @property
    def endpoint(self) -> tuple[str, int] | None:
        """The VPN server's address and port."""
        return (self.line.endpoint, self.line.kind.outer[0][1]) if self.client else None

    @property
    def home4(self) -> str:
        """The home's public address, which must never be seen outside."""
        return self.line.home4

    @property
    def home6(self) -> str | None:
        """The host's own public IPv6 address, beside the tunnel."""
        return f"{self.line.plan.lan6}:10" if self._six else None

    @property
    def home_networks(self) -> list[str]:
        return [f"{self.home4}/32", *([] if self.home6 is None else [self.line.plan.prefix6])]

    @property
    def exit4(self) -> str:
        """The address the world should see."""
        return self.line.exits[0] if self.line.vpn else self.home4

    @property
    def standby_exit4(self) -> str:
        """The same once the second WireGuard has taken over (`standby=`)."""
        assert self.line.standby is not None
        return self.line.standby.exits(self.line.plan.client)["first"][0]

    @property
    def exit6(self) -> str | None:
        """The same for IPv6; None when none goes through the tunnel."""
        if self.line.vpn is None:
            return self.home6
        return self.line.exits[1] if self.line.ipv6 == "tunnel" else None

    @property
    def inner4(self) -> str:
        """The host's address in the tunnel."""
        return self.line.inner[0]

    @property
    def gateway4(self) -> str:
        """The VPN server's address in the tunnel."""
        assert self.line.provider is not None
        assert self.line.vpn is not None
        return self.line.provider.inner4(self.line.vpn, 1)

    @property
    def lan(self) -> str:
        return f"{self.line.plan.lan4}.0/24"

    @property
    def lan4(self) -> str:
        """The host's address on the LAN."""
        return f"{self.line.plan.lan4}.10"

    @property
    def router4(self) -> str:
        return f"{self.line.plan.lan4}.1"

    @property
    def server_lan(self) -> str | None:
        """The server's address on this LAN (`lan_server=True`)."""
        return f"{self.line.plan.lan4}.2" if self.site.lan_server else None

    @property
    def resolvers(self) -> tuple[str, ...]:
        return self.line.resolvers

    # Doing things on the host

    def run(self, command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the client host; see `Node.run`."""
        return self.host.run(command, **options)

    def spawn(self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, log: str | None = None,
              cwd: str | Path | None = None) -> Process:  # fmt: skip
        """Start a program on the client host; see `Node.spawn`."""
        return self.host.spawn(command, env=env, log=log, cwd=cwd)

    def http(self, method: str, url: str, **options: Any) -> Response:
        """An HTTP request from the client host; see `Node.http`."""
        return self.host.http(method, url, **options)

    def gluetun(self, **said: Any) -> Gluetun:
        """Start gluetun's control API on this host, at 127.0.0.1:8000; it says what it is told to say."""
        socket = self.host.directory / f"gluetun-{self.name}.sock"
        socket.unlink(missing_ok=True)
        process = self.host.spawn([sys.executable, "-m", "lab.gluetun", socket], env=import_path(), log="gluetun")

        def connected() -> Control | None:
            if process.poll() is not None:
                raise RuntimeError(f"the stand-in for gluetun ended:\n{process.output()}")
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return Control(socket)
            return None

        control = until(connected, 20, f"{self.name}: gluetun")
        assert control is not None
        found = Gluetun(control, process)
        found.say(**{"public_ip": self.exit4, **said})
        return found

    # Being as wanted

    def heal(self) -> None:
        """Undo every fault, and wait until the tunnel carries packets again."""
        broken = self.line
        self.line = replace(self._healthy)
        self.sync()
        if self.client is None or broken == self.line:
            return
        lost = (
            broken.endpoint_blocked, broken.half_open, broken.wan_down, broken.portal, broken.home4 != self.line.home4,
            not broken.peer_admitted, broken.tunnel != "up", broken.orphaned,
        )  # fmt: skip
        # Left alone, either protocol would need many seconds to notice that the path works again.
        if any(lost) and not self._reaches_gateway(1):
            self.client.reconnect()
        self.wait_up()

    def wait_ipv6(self, timeout: float = 15) -> None:
        """Wait until the home's IPv6 line works: neighbour discovery loses packets in a link's first second."""
        if self.site.ipv6 != "none" and not _answers(self.router, CLOUDFLARE6, timeout):
            raise TimeoutError(f"{self.name}: the home's IPv6 does not come up")

    def wait_up(self, timeout: float = 15) -> None:
        """Wait until the tunnel's other end answers."""
        if self.client is not None and not self._reaches_gateway(timeout):
            raise TimeoutError(f"{self.name}: the tunnel does not come up")
        if self.line.ipv6 == "outside" and not _answers(self.host, CLOUDFLARE6, timeout):
            raise TimeoutError(f"{self.name}: IPv6 does not come up")

    def sync(self) -> None:
        """Make everything look like `self.line`."""
        before, line = self._now, self.line
        self._link_host()
        self._route_host(before)
        self.host.nft("lab", host(line))
        self._sync_router(before)
        self._push(self, before)
        self._sync_networks(before)
        self._sync_tunnel(before)
        if self.standby is not None and line.standby_tunnel == "up":
            self.standby.up()
        elif self.standby is not None:
            self.standby.down()
        if before is not None and before.next_server != line.next_server:
            assert isinstance(self.client, WireGuardClient | OpenVpnClient)
            self.client.move(line.endpoint)
        self.host.resolv_conf(line.resolvers)
        self._help("portal", wanted=line.portal, on=self.router, command=self._portal_command)
        if before is not None and before.answered != line.answered:
            self._help("adblock", wanted=False, on=self.host, command=self._ad_blocker_command)
        self._help("deny", wanted=line.names_denied, on=self.host, command=self._denying_command)
        self._help("adblock", wanted=bool(line.answered), on=self.host, command=self._ad_blocker_command)
        flood = ["ping", "-q", "-f", "-l", "60", "-s", "1200", OPENDNS]  # keeps 60 packets under way
        self._help("flood", wanted=line.rate_kbit > 0, on=self.host, command=lambda: flood)
        self._now = replace(line)

    def _reaches_gateway(self, timeout: float) -> bool:
        return _answers(self.host, self.gateway4, timeout)

    def _link_host(self) -> None:
        if self.line.orphaned:
            for client in self.clients.values():
                client.kill()
            if self._line_process is not None:
                self._line_process.stop()
                self._line_process = None
            self.host.ip("link del eth0", "link del eth1", force=True)
            return
        match self.uplink.kind:
            case "ppp" if not self.host.has_link("ppp0"):
                there = f"/proc/{self.host.pid}/ns/net"
                self._connect_line(self.router, [sys.executable, "-m", "lab.ppp", there, "ppp0", "host"])
                until(lambda: self.router.has_link("host"), 5, f"{self.name}: the router's end of its line")
                mine, peer = f"{self.line.plan.lan4}.1", f"{self.line.plan.lan4}.10"
                self.router.ip(f"addr replace {mine} peer {peer} dev host", "link set host mtu 1492 up")
            case "rootless" if not self.host.has_link("tap0"):
                assert self.machine is not None
                there = f"/proc/{self.host.pid}/ns/net"
                words = ["--configure", "--mtu=1500", "--disable-host-loopback", "--netns-type=path", there, "tap0"]
                self._connect_line(self.machine, ["slirp4netns", *words])
            case "ppp" | "rootless":
                return
            case "two":
                self._plug("eth0", "host")
                self._plug("eth1", "host2")
                self.router.ip(f"addr replace {self.line.plan.second4}.1/24 dev host2", "link set host2 up")
            case _:
                self._plug("eth0", "host")

    def _plug(self, here: str, there: str) -> None:
        if self.host.has_link(here):
            return
        if not self.router.has_link(there):  # at first the lab has made the cable already
            cable = f"link add {here} netns {self.host.pid} type veth peer name {there} netns {self.router.pid}"
            subprocess.run(["ip", *cable.split()], check=True)
        if there == "host":
            self.router.ip("link set host master br0 up")

    def _connect_line(self, node: Node, command: Sequence[str]) -> None:
        """Start what makes the host's uplink, and wait for the device."""
        process = self._line_process = node.spawn(command, env=import_path(), log="uplink")
        device = self.uplink.interface

        def there() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"{self.name}: the uplink ended:\n{process.output()}")
            return self.host.has_link(device) and (self.uplink.address is not None or self._has_route(device))

        until(there, 10, f"{self.name}: {device}")

    def _has_route(self, device: str) -> bool:
        routes = Path(f"/proc/{self.host.pid}/net/route").read_text().splitlines()[1:]
        return any(fields[:2] == [device, "00000000"] for fields in map(str.split, routes))

    def _route_host(self, before: Line | None) -> None:
        plan, line, way = self.line.plan, self.line, self.uplink
        if line.orphaned:
            return
        lines = ["link set lo up", f"link set {way.interface} up", f"route replace default {way.way} table {_OUTSIDE}"]
        if way.address is not None:
            lines.insert(2, f"addr replace {way.address} dev {way.interface}")
        if way.kind == "ppp":
            lines.insert(1, "link set ppp0 mtu 1492")
        if way.kind == "two":
            lines += ["link set eth1 up", f"addr replace {plan.second4}.2/24 dev eth1"]
            lines += [f"route replace default via {plan.second4}.1 dev eth1 metric 100"]
        held = self.client is not None and self.client.owns_default and before is not None
        if way.kind == "bare":
            lines += [f"route replace {line.endpoint} {way.way}"]
        elif not held:
            lines += [f"route replace default {way.way}"]
        if line.standby is not None and line.vpn not in ("wireguard", "wg-quick"):
            lines += [f"route replace {line.standby.endpoint} {way.way}"]  # else it would go inside the first tunnel
        if self._six:
            lines += [
                f"addr replace {plan.lan6}:10/64 dev eth0 nodad",
                "addr replace fe80::10/64 dev eth0 nodad",
                *([] if held or way.kind == "bare" else [f"-6 route replace default via {plan.lan6}:1 dev eth0"]),
                # Without it, the gateway itself would not be on a link any more while the rule below is there.
                f"-6 route replace {plan.lan6}:/64 dev eth0 table {_OUTSIDE}",
                f"-6 route replace default via {plan.lan6}:1 dev eth0 table {_OUTSIDE}",
            ]
        lent = before.leased if before else None
        lines += [f"addr del {lent} dev {way.interface}"] if lent and lent != line.leased else []
        lines += [f"addr replace {line.leased} dev {way.interface}"] if line.leased else []
        self.host.ip(*lines)
        had, has = self._rules(before) if before else set(), self._rules(line)
        routed = before.routed if before else frozenset()
        changes = [_rule("del", rule) for rule in sorted(had - has)] + [
            _rule("add", rule) for rule in sorted(has - had)
        ]
        changes += [f"{self._route('del', destination)}" for destination in sorted(routed - line.routed)]
        changes += [f"{self._route('replace', destination)}" for destination in sorted(line.routed - routed)]
        if changes:
            self.host.ip(*changes)
        self._rule_by_dscp(before.dscp if before else None)

    def _rule_by_dscp(self, had: int | None) -> None:
        pref, has = "74", self.line.dscp
        if had not in (None, has):
            self.host.ip(f"rule del pref {pref}")
        if has not in (None, had):
            command = [sys.executable, "-S", dscp.SCRIPT, pref, str(has), str(_OUTSIDE)]
            self.host.run(command, check=True)

    def _rules(self, line: Line) -> set[str]:
        """Routing rules beside the tunnel's own, each as `ip rule add` takes it."""
        rules = {f"pref 100 to {destination} table {_OUTSIDE}" for destination in line.outside}
        if self.site.ipv6 == "tunnel" and line.ipv6 != "tunnel":
            rules.add(f"pref 90 to 2000::/3 table {_OUTSIDE}")
        if line.published:
            rules.add(f"pref 60 from {self.uplink.host4} table {_OUTSIDE}")
        if line.marked:
            rules.add("pref 5210 fwmark 0x80000/0xff0000 table main")
        if line.firewalled:
            rules.add(f"pref 75 fwmark {MARK} table main")
        rules |= line.ruled
        if line.no_ipv4:
            rules.add(f"pref 69 to {self.lan} table main")  # no gateway of a route could be set otherwise
            rules.add("unreachable pref 70")
        if line.vpn_uid is not None:
            rules.add(f"pref 78 to {self.gateway4} table {FWMARK}")
            rules.add(f"pref 79 fwmark {FWMARK} table main")
            rules.add(f"pref 80 uidrange {line.vpn_uid}-{line.vpn_uid} table {FWMARK}")
            rules.add("pref 81 table main")
        return rules

    def _route(self, verb: str, destination: str) -> str:
        if ":" in destination:
            return f"-6 route {verb} {destination} via {self.line.plan.lan6}:1 dev eth0"
        return f"route {verb} {destination} {self.uplink.way}"

    def _sync_router(self, before: Line | None) -> None:
        line = self.line
        if before is None or before.home4 != line.home4:
            self.router.ip(
                *([f"addr del {before.line4}/24 dev wan"] if before and not line.cgnat else []),
                f"addr replace {line.line4}/24 dev wan",
                f"route replace default via {f'{line.plan.carrier4}.1' if line.cgnat else line.plan.isp_side} dev wan",
            )
        if self.router.nft("lab_nat", router_nat(line)) and before is not None:
            self.router.run(["conntrack", "-F"])
        self.router.nft("lab", router_filter(line))
        if before is None or before.wan_down != line.wan_down:
            link = f"h{line.plan.number}"
            self._isp.ip(*([f"link set {link} down"] if line.wan_down else isp_side(line.plan, self.site)))
        if before is not None and before.rate_kbit != line.rate_kbit:
            for node, link in ((self.router, "wan"), (self._isp, f"h{line.plan.number}")):
                change = ["replace", "dev", link, "root", "tbf", "rate", f"{line.rate_kbit}kbit", "burst", "16kb",
                          "latency", "400ms"]  # fmt: skip
                node.run(["tc", "qdisc", *(change if line.rate_kbit else ["del", "dev", link, "root"])], check=True)

    def _sync_tunnel(self, before: Line | None) -> None:
        line, client = self.line, self.client
        if client is None or line.orphaned:
            return
        for kind, other in self.clients.items():
            if kind != line.vpn:
                other.down()
        if (
            before is not None
            and before.tunnel == "link_down" != line.tunnel
            and line.vpn not in ("wireguard", "wg-quick")
        ):
            client.kill()  # its routes went down with the link, and only a new start adds them again
        match line.tunnel:
            case "up":
                client.up()
                self._route_by_object(before.by_object if before else "")
                if line.balanced:
                    ways = f"nexthop dev {client.interface} weight 1 nexthop {self.uplink.way} weight 1"
                    self.host.ip(f"route replace default table {FWMARK} {ways}")
            case "link_down":
                if not self.host.has_link(client.interface):
                    client.up()
                self.host.ip(f"link set {client.interface} down")
            case "deleted":
                client.down()
            case _:
                client.kill()

    def _route_by_object(self, had: str) -> None:
        """A route that names a nexthop object. The kernel is told to say no more of it than the object's number."""
        line, number = self.line, 66
        if line.by_object:
            way = self.uplink.way if line.object_turned else f"dev {line.interface}"
            table = FWMARK if line.vpn in ("wireguard", "wg-quick") else "main"
            self._set("net.ipv4.nexthop_compat_mode", 0)
            self.host.ip(f"nexthop replace id {number} {way}")
            if had != line.by_object:
                self.host.ip(f"route replace {line.by_object} nhid {number} table {table}")
        elif had:
            self.host.ip(f"nexthop del id {number}", force=True)  # with its route; gone already if its device went
            self._set("net.ipv4.nexthop_compat_mode", 1)

    def _sync_networks(self, before: Line | None) -> None:
        """Networks of containers, each a pair of devices with an address.

        The kernel has room for filters as before Linux 6.8: 20 KB a socket, and not 128.
        """
        had, has = before.networks if before else 0, self.line.networks
        if had == has:
            return
        self._set("net.core.optmem_max", 20480 if has else 131072)
        self.host.ip(*(f"link del c{n}" for n in range(has, had)))
        new = range(had, has)
        lines = [[f"link add c{n} type veth peer name d{n}", f"link set d{n} up", f"link set c{n} up",
                  f"addr add 10.200.{n}.1/24 dev c{n}"] for n in new]  # fmt: skip
        self.host.ip(*(line for each in lines for line in each))

    def _set(self, key: str, value: int) -> None:
        """A sysctl of the host; a kernel without that knob has nothing to set."""
        self.host.run(["sysctl", "-e", "-qw", f"{key}={value}"], check=True)

    def _help(self, name: str, *, wanted: bool, on: Node, command: Callable[[], Sequence[str]]) -> None:
        running = self._helpers.get(name)
        if wanted and running is None:
            self._helpers[name] = on.spawn(command(), log=name, env=import_path())
            if name in _LISTENS:
                on.wait_port(*_LISTENS[name])
        elif not wanted and running is not None:
            running.stop()
            del self._helpers[name]

    def _ad_blocker_command(self) -> Sequence[str]:
        """A forwarder on this host that answers some names itself, and asks the usual resolver for the rest."""
        words = [
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--pid-file=",
            "--user=root",
            "--no-resolv",
            "--no-hosts",
        ]
        words += ["--listen-address=127.0.0.1", "--bind-interfaces", f"--server={self._healthy.resolvers[0]}"]
        return ["dnsmasq", *words, *(f"--address={each}" for each in self.line.answered)]

    def _denying_command(self) -> Sequence[str]:
        """A resolver on this host that has no names at all."""
        config = self.host.directory / f"denying-{self.name}.conf"
        config.write_text(
            'server:\n  username: ""\n  chroot: ""\n  pidfile: ""\n  use-syslog: no\n  interface: 127.0.0.1\n'
            '  local-zone: "test." nodefault\n  local-zone: "." always_nxdomain\n'
        )
        return ["unbound", "-d", "-c", str(config)]

    def _portal_command(self) -> Sequence[str]:
        assert self.portal_files is not None
        return [sys.executable, "-m", "lab.portal", *map(str, self.portal_files)]


def _answers(node: Node, address: str, timeout: float) -> bool:
    """Whether an address answers a ping before the deadline; many short attempts."""
    command = f"until ping -n -q -c 1 -W 0.3 {address} >/dev/null 2>&1; do sleep 0.02; done"
    with contextlib.suppress(subprocess.TimeoutExpired):
        return node.run(["sh", "-c", command], timeout=timeout).returncode == 0
    return False


def _rule(verb: str, rule: str) -> str:
    return f"{'-6 ' if ':' in rule else ''}rule {verb} {rule}"


def isp_side(plan: HomePlan, site: Site) -> list[str]:
    """The ISP's end of a home's line: going down takes addresses and routes with it."""
    link = f"h{plan.number}"
    return [
        f"link set {link} up",
        f"addr replace {f'{plan.carrier4}.1' if site.cgnat else plan.isp_side}/24 dev {link}",
        *([f"link set {link} mtu {site.mtu}"] if site.mtu else []),
        f"addr replace {plan.wan6}:1/64 dev {link} nodad",
        f"addr replace fe80::1/64 dev {link} nodad",
        f"-6 route replace {plan.prefix6} via {plan.wan6}:2 dev {link}",
    ]
