"""The lab: wiring all nodes together, up and down."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab import plan, rules
from lab.capture import Capture, capture
from lab.certs import Authority, Pair
from lab.client import Control, Dns, Service, Sink, Telegram
from lab.home import Home, Site
from lab.mmdb import write_mmdb
from lab.nodes import Node, Process, Response, import_path, until
from lab.resolvers import Resolver
from lab.rules import Line
from lab.vpn import Tunnels, Wanted


class Lab:
    """An internet in a box. Use it as a context manager.

    `directory`: where certificates and logs go, empty or new; kept afterwards. Without one, a temporary directory that
    goes as well.
    """

    def __init__(self, sites: Sequence[Site] = (), *, directory: Path | None = None) -> None:
        if len({site.name for site in sites}) != len(sites):
            raise ValueError("two sites of the same name")
        self.sites = list(sites)
        self.prefix = f"vs{secrets.token_hex(2)}"
        self._given = directory
        self.nodes: dict[str, Node] = {}
        self.homes: dict[str, Home] = {}
        self.resolvers: dict[str, Resolver] = {}
        self._rewriters: dict[str, Process] = {}
        self._lock = threading.Lock()
        self._holder: subprocess.Popen[str] | None = None
        self._control: Control | None = None

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.down()

    # Parts

    @property
    def srv(self) -> Node:
        """Where the server runs: `SRV4`, `SRV6`, name sentinel.test."""
        return self.nodes["srv"]

    server4, server6, server_name = plan.SRV4, plan.SRV6, plan.SRV_NAME

    def site(self, name: str) -> Home:
        return self.homes[name]

    def node(self, name: str) -> Node:
        """inet, isp, svc, srv, a provider (nl, ch, us), a site's host (its name) or router (name-home)."""
        return self.nodes[name]

    def service(self, name: str) -> Service:
        """A stand-in: ipinfo, ipapi, ipwhois, mullvad, trace, telegram, webhook, mail, dns."""
        assert self._control is not None
        return Service(self._control, name)

    @property
    def telegram(self) -> Telegram:
        assert self._control is not None
        return Telegram(self._control, "telegram")

    @property
    def webhook(self) -> Sink:
        assert self._control is not None
        return Sink(self._control, "webhook")

    @property
    def mail(self) -> Sink:
        assert self._control is not None
        return Sink(self._control, "mail")

    @property
    def dns(self) -> Dns:
        assert self._control is not None
        return Dns(self._control, "dns")

    def http(self, node: str | Node | Home, method: str, url: str, **options: Any) -> Response:
        """An HTTP request from a node, by name or itself; see `Node.http`."""
        return (self.nodes[node] if isinstance(node, str) else node).http(method, url, **options)

    @contextlib.contextmanager
    def capture(self, where: str | Home, expression: str = "", interface: str | None = None) -> Iterator[Capture]:
        """Packets on a site's WAN line (a site or its name), or on any interface of a node, with a tcpdump filter."""
        name = where.name if isinstance(where, Home) else where
        if name in self.homes and interface is None:
            node, link = self.homes[name].router, "wan"
        else:
            node, link = self.nodes[name], interface or "any"
        with capture(node, expression, link) as running:
            yield running

    # Up and down

    def up(self) -> None:
        """Bring everything up; whatever goes wrong, nothing stays behind."""
        if os.geteuid() != 0:
            raise PermissionError("the lab needs root: it makes network namespaces")
        if self._given is not None:
            self._given.mkdir(parents=True, exist_ok=True)
            if any(self._given.iterdir()):
                raise FileExistsError(f"{self._given} is not empty: a lab starts from an empty folder")
        self.dir = self._given or Path(tempfile.mkdtemp(prefix=f"{self.prefix}-lab-"))
        self.dir.chmod(0o755)  # an agent that runs without root reads the CA here
        (self.dir / "logs").mkdir(exist_ok=True)
        try:
            with ThreadPoolExecutor(8) as pool:
                self._up(pool)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Take everything down. The holder does it, as it would if this process were killed."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._holder is not None:
            assert self._holder.stdin is not None
            assert self._holder.stdout is not None
            self._holder.stdin.close()
            self._holder.wait(15)
            self._holder.stdout.close()
            self._holder = None
        for node in self.nodes.values():
            node.reap()

    def _up(self, pool: ThreadPoolExecutor) -> None:
        holder = self._start_holder()
        authority = Authority(self.dir)
        self.ca_file = authority.file
        lan_addresses = [f"{plan.HomePlan(n).lan4}.2" for n, site in enumerate(self.sites) if site.lan_server]
        self.server_cert: Pair = authority.issue(
            "sentinel", [plan.SRV_NAME, f"*.{plan.SRV_NAME}", plan.SRV4, plan.SRV6, *lan_addresses]
        )
        authority.issue("outside", [*plan.HOSTS, plan.CLOUDFLARE, plan.CLOUDFLARE6])
        self.mmdb = self.dir / "places.mmdb"
        database = pool.submit(write_mmdb, self.mmdb)
        self._await_holder(holder)

        self._cable()
        _all(pool, [self._configurer(name) for name in self.nodes])
        tunnels = Tunnels(authority)
        for number, site in enumerate(self.sites):
            self._make_home(number, site, tunnels)
        servers = list(tunnels.servers.values())
        _all(pool, [self._start_outside, self._start_resolvers, *(server.start for server in servers)])
        until(lambda: all(server.ready for server in servers), 20, "VPN servers")
        _all(pool, [home.sync for home in self.homes.values()])
        _all(pool, [*(home.wait_up for home in self.homes.values()), *(home.wait_ipv6 for home in self.homes.values())])
        until(lambda: all(resolver.ready for resolver in self.resolvers.values()), 20, "resolvers")
        self._connect()
        database.result()
        self._describe()

    def _start_holder(self) -> subprocess.Popen[str]:
        forwards = {"inet": True, "isp": True, "svc": False, "srv": False}
        for site in self.sites:
            forwards |= {site.name: False, f"{site.name}-home": True}
            if site.vpn:
                forwards[site.provider] = True
            if site.standby:
                forwards[site.standby] = True
            if site.reference:
                forwards[f"{site.name}-ref"] = False
            if site.uplink == "rootless":
                forwards[f"{site.name}-machine"] = False
        order = {"prefix": self.prefix, "directory": str(self.dir), "nodes": forwards, "remove": self._given is None}
        self._holder = subprocess.Popen(
            [sys.executable, "-I", Path(__file__).with_name("holder.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C at the terminal is the owner's to handle
        )
        assert self._holder.stdin is not None
        self._holder.stdin.write(json.dumps(order) + "\n")
        self._holder.stdin.flush()
        return self._holder

    def _await_holder(self, holder: subprocess.Popen[str]) -> None:
        assert holder.stdout is not None
        line = holder.stdout.readline()
        if not line:
            raise RuntimeError("the namespaces could not be made; the holder's error is on standard error")
        for name, pid in json.loads(line).items():
            self.nodes[name] = Node(name, pid, self.dir, self.ca_file)
        for name in self._neighbours:
            self.nodes[name].address4, self.nodes[name].address6 = _own_addresses(name)[:2]

    @property
    def _neighbours(self) -> list[str]:
        """Nodes with a link of their own to the core."""
        return [name for name in ("isp", "svc", "srv", *plan.PROVIDERS) if name in self.nodes]

    def _cable(self) -> None:
        """All links in one batch, each end made directly in its namespace: no name ever appears in ours."""
        cables = [("inet", name, name, "eth0") for name in self._neighbours]
        for number, site in enumerate(self.sites):
            router = f"{site.name}-home"
            cables += [("isp", f"h{number}", router, "wan")]
            if site.uplink != "ppp":
                machine = f"{site.name}-machine" if site.uplink == "rootless" else site.name
                cables.append((router, "host", machine, "eth0"))
            if site.uplink == "two":
                cables.append((router, "host2", site.name, "eth1"))
            if site.lan_server:
                cables.append((router, "srv", "srv", f"lan{number}"))
            if site.reference:
                cables.append((router, "ref", f"{site.name}-ref", "eth0"))
        lines = [
            f"link add {a_end} netns {self.nodes[a].pid} type veth peer name {b_end} netns {self.nodes[b].pid}"
            for a, a_end, b, b_end in cables
        ]
        subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)

    def _configurer(self, name: str) -> Callable[[], None]:
        """What gives one node its addresses and routes."""
        node = self.nodes[name]
        if name == "inet":
            lines = [line for number, other in enumerate(self._neighbours) for line in _core_side(number, other)]
        elif name in self._neighbours:
            lines = _edge(self._neighbours.index(name), _own_addresses(name))
        elif name.endswith("-home"):
            number = [site.name for site in self.sites].index(name.removesuffix("-home"))
            lines = _router(plan.HomePlan(number), [end for end in ("host", "srv", "ref") if node.has_link(end)])
            lines += _line(self.sites[number].mtu, "wan")
        elif name.endswith("-machine"):
            number = [site.name for site in self.sites].index(name.removesuffix("-machine"))
            lines = _machine(plan.HomePlan(number))
        elif name.endswith("-ref"):
            number = [site.name for site in self.sites].index(name.removesuffix("-ref"))
            lines = _reference(plan.HomePlan(number), ipv6=self.sites[number].ipv6 != "none")
        else:
            lines = []  # a site's host configures itself, because faults reconfigure it
        if name == "srv":
            for number, site in enumerate(self.sites):
                if site.lan_server:
                    lines += _server_leg(plan.HomePlan(number), f"lan{number}", ipv6=site.ipv6 != "none")
        resolver = plan.ISP_RESOLVER if name.endswith(("-home", "-ref", "-machine")) else plan.GOOGLE

        def configure() -> None:
            node.resolv_conf([resolver])
            node.ip("link set lo up", *lines)

        return configure

    def _make_home(self, number: int, site: Site, tunnels: Tunnels) -> None:
        host, router = self.nodes[site.name], self.nodes[f"{site.name}-home"]
        home = Home(site, site.line(number), host, router, self.nodes["isp"], self._push)
        home.reference = self.nodes.get(f"{site.name}-ref")
        home.machine = self.nodes.get(f"{site.name}-machine")
        hotspot = self.dir / f"hotspot-{site.name}"
        hotspot.mkdir()
        pair = Authority(hotspot, "Hotspot").issue("login", ["login.hotspot.test"])
        home.portal_files = (pair.cert, pair.key)
        self.homes[site.name] = home
        host.ip("link set lo up")
        if home.line.provider is None:
            return
        for kind in filter(None, (site.vpn, site.other)):
            wanted = Wanted(
                kind=kind, provider=home.line.provider, host=host, server=self.nodes[site.provider],
                client=home.line.plan.client, ipv6=site.ipv6 == "tunnel", keepalive=site.keepalive, device=site.device,
                way=home.uplink.way, lan=home.lan,
                next_server=home.line.provider.server(plan.NEXT_SERVER) if site.next_server else None,
            )  # fmt: skip
            home.clients[kind] = tunnels.client(wanted)
        if (standby := home.line.standby) is not None:
            home.standby = tunnels.standby(
                host, standby, self.nodes[standby.name], home.line.plan.client, ipv6=site.ipv6 == "tunnel"
            )

    def _start_outside(self) -> None:
        command = [sys.executable, "-m", "lab.outside", str(self.dir)]
        self._outside = self.nodes["svc"].spawn(command, env=import_path(), log="outside")

    def _start_resolvers(self) -> None:
        svc, isp = self.nodes["svc"], self.nodes["isp"]
        made = {
            "isp": Resolver(
                isp, "isp", listen=[plan.ISP_RESOLVER, plan.ISP_RESOLVER6], egress=plan.ISP_RESOLVER_EGRESS
            ),
            "cloudflare": Resolver(svc, "cloudflare", listen=["127.0.0.1"], egress=plan.CLOUDFLARE_EGRESS, port=5353),
            "google": Resolver(svc, "google", listen=[plan.GOOGLE, plan.GOOGLE6], egress=plan.GOOGLE_EGRESS, ecs=True),
        }
        for name, provider in plan.PROVIDERS.items():
            if name in self.nodes:
                listen = [provider.resolver4, provider.resolver6]
                made[name] = Resolver(self.nodes[name], name, listen=listen, egress=provider.resolver_egress)
        self.resolvers = made

    def _connect(self) -> None:
        def connected() -> Control | None:
            if self._outside.poll() is not None:
                raise RuntimeError(f"the stand-ins ended:\n{self._outside.output()}")
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):  # not bound, or not listening yet
                return Control(self.dir / "control.sock")
            return None

        self._control = until(connected, 20, "the stand-ins")

    def _describe(self) -> None:
        """For `python -m lab status` and `shell`, from another terminal."""
        facts = {
            "prefix": self.prefix,
            "owner": os.getpid(),
            "nodes": {name: node.pid for name, node in self.nodes.items()},
            "ca_file": str(self.ca_file),
            "sites": {
                home.name: {
                    "vpn": home.site.vpn,
                    "home4": home.home4,
                    "exit4": home.exit4,
                    "exit6": home.exit6,
                    "interface": home.vpn_interface,
                }
                for home in self.homes.values()
            },
        }
        (self.dir / "lab.json").write_text(json.dumps(facts, indent=1))

    # Faults that reach beyond a home

    def _push(self, home: Home, before: Line | None) -> None:
        """Bring ISP, provider and resolvers in line with all homes."""
        line, lines = home.line, [other.line for other in self.homes.values()]
        with self._lock:
            self.nodes["isp"].nft("lab", rules.isp(lines))
            self.nodes["isp"].nft("lab_nat", rules.isp_nat(lines))
            if before is not None and before.refused_names != line.refused_names:
                refused = frozenset().union(*(other.refused_names for other in lines))
                for resolver in self.resolvers.values():
                    resolver.refuse(refused)
            if line.provider is None:
                return
            if line.standby is not None and before is None:
                self._serve(line.standby, lines)
            node = self.nodes[line.provider.name]
            if line.dns_rewritten:
                self._start_rewriter(line.provider)
            if self._serve(line.provider, lines) and before is not None:
                # Open connections would keep their old translation; others' are none of our business.
                for family, address in zip(("ipv4", "ipv6"), line.inner, strict=True):
                    node.run(["conntrack", "-D", "-f", family, "-s", address])
                node.run(["conntrack", "-D", "-s", line.provider.resolver_egress])
            admitted = before is None or before.peer_admitted
            if admitted != line.peer_admitted:
                assert home.client is not None
                home.client.admit(admitted=line.peer_admitted)

    def _serve(self, provider: plan.Provider, lines: Sequence[Line]) -> bool:
        """Bring one provider's rules in line; whether its NAT changed."""
        node = self.nodes[provider.name]
        guests = [guest for other in lines if (guest := other.guest_of(provider)) is not None]
        node.nft("lab", rules.provider_filter(guests))
        return node.nft("lab_nat", rules.provider_nat(provider, guests))

    def _start_rewriter(self, provider: plan.Provider) -> None:
        if provider.name in self._rewriters:
            return
        address, port = provider.resolver4, str(plan.REWRITER)
        command = [sys.executable, "-m", "lab.outside.rewriter", address, port, address]
        node = self.nodes[provider.name]
        self._rewriters[provider.name] = node.spawn(command, env=import_path(), log="rewriter")
        node.wait_port(plan.REWRITER, protocol="udp")


def _all(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], object]]) -> None:
    for future in [pool.submit(job) for job in jobs]:
        future.result()


def _quick(link: str) -> str:
    """Neighbour discovery tries again after 0.1 s instead of 1 s."""
    return f"ntable change name ndisc_cache dev {link} retrans 100"


def _core_side(number: int, node: str) -> list[str]:
    lines = [
        f"addr add 62.115.{number}.1/30 dev {node}",
        f"addr add 2001:2034:0:{number}::1/64 dev {node} nodad",
        f"addr add fe80::1/64 dev {node} nodad",
        f"link set {node} up",
        _quick(node),
    ]
    for network, owner, _ in plan.networks():
        if owner == node:
            via = f"2001:2034:0:{number}::2" if network.version == 6 else f"62.115.{number}.2"
            lines.append(f"route add {network} via {via}")
    return lines


def _edge(number: int, addresses: list[str]) -> list[str]:
    """A node at the edge of the core; its first address of each family is what it speaks from."""
    lines = [f"addr add {a}/{128 if ':' in a else 32} dev lo{' nodad' if ':' in a else ''}" for a in addresses]
    lines += [
        f"addr add 62.115.{number}.2/30 dev eth0",
        f"addr add 2001:2034:0:{number}::2/64 dev eth0 nodad",
        "addr add fe80::2/64 dev eth0 nodad",
        "link set eth0 up",
        _quick("eth0"),
    ]
    first4 = next(a for a in addresses if ":" not in a)
    first6 = next(a for a in addresses if ":" in a)
    lines.append(f"route add default via 62.115.{number}.1 src {first4}")
    lines.append(f"-6 route add default via 2001:2034:0:{number}::1 src {first6}")
    return lines


def _own_addresses(name: str) -> list[str]:
    if name == "isp":
        return ["91.10.0.1", "2003:e0::1", plan.ISP_RESOLVER, plan.ISP_RESOLVER6, plan.ISP_RESOLVER_EGRESS]
    if name == "srv":
        return [plan.SRV4, plan.SRV6]
    if name == "svc":
        return ["5.9.10.2", "2a01:4f8:160:1::2", *plan.SVC_ADDRESSES]
    p = plan.PROVIDERS[name]
    servers = [p.server(octet) for octet in plan.SERVERS]
    return [*servers, f"{p.net6}:2", p.resolver4, p.resolver6, p.resolver_egress]


def _router(home: plan.HomePlan, more: list[str]) -> list[str]:
    return [
        "link add br0 type bridge mcast_snooping 0",
        "link set br0 up",
        *(f"link set {end} master br0 up" for end in more),
        f"addr add {home.lan4}.1/24 dev br0",
        f"addr add {rules.DOCKER}.1/16 dev br0",
        f"addr add {home.lan6}:1/64 dev br0 nodad",
        "addr add fe80::1/64 dev br0 nodad",
        "link set wan up",
        _quick("wan"),
        _quick("br0"),
        f"addr add {home.wan6}:2/64 dev wan nodad",
        "addr add fe80::2/64 dev wan nodad",
        f"-6 route add default via {home.wan6}:1 dev wan",
    ]


def _line(mtu: int, link: str) -> list[str]:
    """A line that carries less than Ethernet does: 1,492 bytes by PPPoE, 1,460 where IPv4 is inside IPv6, 1,280."""
    return [f"link set {link} mtu {mtu}"] if mtu else []


def _machine(home: plan.HomePlan) -> list[str]:
    """The machine that a rootless container runs on."""
    return ["link set eth0 up", f"addr add {home.lan4}.10/24 dev eth0", f"route add default via {home.lan4}.1"]


def _reference(home: plan.HomePlan, *, ipv6: bool) -> list[str]:
    lines = ["link set eth0 up", f"addr add {home.lan4}.11/24 dev eth0", f"route add default via {home.lan4}.1"]
    if ipv6:
        lines += ["addr add fe80::11/64 dev eth0 nodad", f"addr add {home.lan6}:11/64 dev eth0 nodad"]
        lines += [f"-6 route add default via {home.lan6}:1"]
    return lines


def _server_leg(home: plan.HomePlan, link: str, *, ipv6: bool) -> list[str]:
    lines = [f"link set {link} up", f"addr add {home.lan4}.2/24 dev {link}"]
    return [*lines, f"addr add {home.lan6}:2/64 dev {link} nodad"] if ipv6 else lines
