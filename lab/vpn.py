"""Every kind of tunnel by its name: which server a provider needs for it, and which client a home."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lab.certs import Authority
from lab.nested import NEAR, NestedClient, RelayServer, WrappedClient
from lab.nodes import Node
from lab.openconnect import OcservServer, OpenConnectClient
from lab.plan import KINDS, STANDBY, Provider
from lab.strongswan import StrongswanClient, StrongswanServer
from lab.tunnels import Client, OpenVpnClient, OpenVpnServer, Server, WireGuardClient, WireGuardServer
from lab.wg_quick import WgQuickClient

_LATER = 2000
"""Metric of a route that stands by: IPv6's default routes have 1024 where nobody says another."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One home's tunnel. `way` is the host's way out without it: `via ADDRESS dev DEVICE`."""

    kind: str
    provider: Provider
    host: Node
    server: Node
    client: int
    ipv6: bool
    keepalive: int
    device: str | None
    way: str
    lan: str
    next_server: str | None


@dataclass
class Tunnels:
    """The providers' servers, made as homes need them, before any of them starts."""

    authority: Authority
    servers: dict[tuple[str, str], Server] = field(default_factory=dict)

    def client(self, wanted: Wanted) -> Client:
        """A home's end, which its provider's server knows about. ValueError for a kind that does not exist."""
        match wanted.kind:
            case "wireguard":
                return self._wireguard(wanted)
            case "wg-quick":
                return WgQuickClient(
                    wanted.host, wanted.provider, self._wireguard_server(wanted), wanted.client, ipv6=wanted.ipv6,
                    keepalive=wanted.keepalive, interface=wanted.device or KINDS["wg-quick"].interface,
                )  # fmt: skip
            case "wireguard-tcp":
                inner = self._wireguard(wanted, NEAR)
                self._server(wanted, "relay", lambda: RelayServer(wanted.server, wanted.provider))
                return WrappedClient(wanted.host, wanted.provider, inner, wanted.way)
            case "openvpn" | "openvpn-tcp" | "openvpn-tap":
                return self._openvpn(wanted, wanted.kind)
            case "openconnect":
                made = self._server(
                    wanted, "ocserv", lambda: OcservServer(wanted.server, wanted.provider, self.authority)
                )
                assert isinstance(made, OcservServer)
                return OpenConnectClient(wanted.host, made, wanted.client, ipv6=wanted.ipv6, default=wanted.way)
            case "strongswan":
                charon = self._server(wanted, "charon", lambda: StrongswanServer(wanted.server, wanted.provider))
                assert isinstance(charon, StrongswanServer)
                return StrongswanClient(wanted.host, charon, wanted.client, ipv6=wanted.ipv6, lan=wanted.lan)
            case "wireguard-in-openvpn":
                return self._wireguard_in_openvpn(wanted)
            case "openvpn-in-wireguard":
                return self._openvpn_in_wireguard(wanted)
            case other:
                raise ValueError(f"no kind of tunnel {other!r}; there are {', '.join(KINDS)}")

    def standby(self, host: Node, provider: Provider, server: Node, client: int, *, ipv6: bool) -> WireGuardClient:
        """A home's second WireGuard, which the first tunnel's end leaves the traffic to."""
        made = self.servers.setdefault((provider.name, "wireguard"), WireGuardServer(server, provider))
        assert isinstance(made, WireGuardServer)
        return WireGuardClient(
            host, provider, made, client, ipv6=ipv6, keepalive=25, interface=STANDBY, metric=_LATER
        )  # fmt: skip

    def _server(self, wanted: Wanted, name: str, make: Callable[[], Server]) -> Server:
        """The provider's one server of this name."""
        key = wanted.provider.name, name
        if key not in self.servers:
            self.servers[key] = make()
        return self.servers[key]

    def _wireguard_server(self, wanted: Wanted) -> WireGuardServer:
        server = self._server(wanted, "wireguard", lambda: WireGuardServer(wanted.server, wanted.provider))
        assert isinstance(server, WireGuardServer)
        return server

    def _wireguard(
        self, wanted: Wanted, endpoint: tuple[str, int] | None = None, *, ipv6: bool | None = None
    ) -> WireGuardClient:
        return WireGuardClient(
            wanted.host, wanted.provider, self._wireguard_server(wanted), wanted.client,
            ipv6=wanted.ipv6 if ipv6 is None else ipv6, keepalive=wanted.keepalive, endpoint=endpoint,
        )  # fmt: skip

    def _openvpn(
        self, wanted: Wanted, kind: str, remote: str | None = None, only: str | None = None, *, ipv6: bool | None = None
    ) -> OpenVpnClient:
        server = self._server(wanted, kind, lambda: OpenVpnServer(wanted.server, wanted.provider, self.authority, kind))
        assert isinstance(server, OpenVpnServer)
        pair = self.authority.issue(f"client-{wanted.host.name}", [wanted.host.name])
        return OpenVpnClient(
            wanted.host, wanted.provider, server, wanted.client, ipv6=wanted.ipv6 if ipv6 is None else ipv6,
            authority=self.authority, pair=pair, remote=remote, only=only, next_server=wanted.next_server,
        )  # fmt: skip

    def _wireguard_in_openvpn(self, wanted: Wanted) -> Client:
        """OpenVPN first, and nothing but WireGuard's packets in it. Its two halves of the address space would win over
        WireGuard's table, since `suppress_prefixlength 0` lets everything longer than a default route of main pass."""
        through = KINDS[wanted.kind].through
        assert through is not None
        server = wanted.provider.server(through[1])
        outer = self._openvpn(wanted, "openvpn", only=server, ipv6=False)
        inner = self._wireguard(wanted, (server, through[3]))
        # OpenVPN's own packets are unmarked, and without this route WireGuard's table would take them.
        beside = [f"route replace {wanted.provider.server(KINDS[wanted.kind].server)} {wanted.way}"]
        return NestedClient(wanted.host, outer, inner, before=beside, between=[])

    def _openvpn_in_wireguard(self, wanted: Wanted) -> Client:
        """WireGuard first. OpenVPN's two halves of the address space are in main and would take WireGuard's own
        packets as well, so both servers get a host route."""
        through = KINDS[wanted.kind].through
        assert through is not None
        outer = self._wireguard(wanted, ipv6=False)
        remote = wanted.provider.server(through[1])
        inner = self._openvpn(wanted, "openvpn", remote, ipv6=wanted.ipv6)
        return NestedClient(
            wanted.host, outer, inner, before=[f"route replace {wanted.provider.endpoint} {wanted.way}"],
            between=[f"route replace {remote} dev {through[0]}"],
        )  # fmt: skip
