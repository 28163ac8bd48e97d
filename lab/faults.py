"""What can go wrong at one site. Numbers are the rows of the table of situations that must be told apart.

Each fault sets the wanted condition of the site's line and lets `sync` make it so; none undoes another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from lab.plan import CLOUDFLARE, ISP_RESOLVER
from lab.rules import DOCKER, Line


class Faults(ABC):
    """The faults of one site. `heal()` undoes all of them."""

    line: Line
    other: str | None
    """The kind of tunnel that `switch_protocol` goes over to."""

    @abstractmethod
    def sync(self) -> None:
        """Make the site look like `self.line`."""

    def _be(self, **changes: object) -> None:
        self.line = replace(self.line, **changes)  # type: ignore[arg-type]
        self.sync()

    # The tunnel

    def link_down(self) -> None:
        """3: the interface is set down; its routes go with it."""
        self._be(tunnel="link_down")

    def delete_tunnel(self) -> None:
        """4, 5: the interface is gone. Without a kill switch, main's default route takes over at once."""
        self._be(tunnel="deleted")

    def kill_openvpn(self) -> None:
        """45: SIGKILL to OpenVPN (or wireguard-go); the kernel takes the interface away."""
        self._be(tunnel="killed")

    def restore_tunnel(self) -> None:
        """Bring only the tunnel back."""
        self._be(tunnel="up")

    def orphan(self) -> None:
        """28: the VPN's container was recreated, and only `lo` is left in ours."""
        self._be(orphaned=True)

    def set_kill_switch(self, on: bool) -> None:
        """29: switch the kill switch on or off."""
        self._be(kill_switch=on)

    # The path through the ISP

    def block_endpoint(self) -> None:
        """6: the ISP drops what goes to the VPN server's port."""
        self._be(endpoint_blocked=True)

    def half_open(self) -> None:
        """9: only what comes back from the VPN server is dropped."""
        self._be(half_open=True)

    def mtu_black_hole(self, size: int = 1300) -> None:
        """30: the ISP silently drops tunnel packets larger than this."""
        self._be(mtu=size)

    def loss(self, percent: int = 30) -> None:
        """32: packets from the VPN server are lost."""
        self._be(loss=percent)

    def saturate(self, kbit: int = 1000) -> None:
        """31: a slow line with a deep queue, filled by somebody else's traffic through the tunnel."""
        self._be(rate_kbit=kbit)

    # The provider

    def no_forwarding(self) -> None:
        """7: the VPN server answers, but forwards nothing."""
        self._be(forwarding=False)

    def revoke_peer(self) -> None:
        """8: the account is gone."""
        self._be(peer_admitted=False)

    def move_exit(self, *, country: str | None = None) -> None:
        """11, 12: another exit address; `country="other"` (or its code) for one in the provider's second country."""
        known = {"same": "same", "first": "first", "other": "elsewhere"}
        if self.line.provider is not None:
            known[self.line.provider.country] = "same"
            known[self.line.provider.country_elsewhere] = "elsewhere"
        self._be(exit=known[country or "same"])

    def drop_destination(self, *addresses: str) -> None:
        """35: these destinations do not want VPN users."""
        self._be(dropped=self.line.dropped | set(addresses))

    def open_port(self, port: int) -> None:
        """38, healthy: the provider forwards exit:port to the client."""
        self._be(ports={**self.line.ports, port: True})

    def close_port(self, port: int) -> None:
        """38: the port is still promised, but nothing comes in."""
        self._be(ports={**self.line.ports, port: False})

    # DNS

    def resolver_outside(self, resolver: str = ISP_RESOLVER) -> None:
        """15: the system's resolver (the ISP's, unless told otherwise) is asked outside the tunnel."""
        self._be(resolvers=(resolver,), outside=self.line.outside | {resolver})

    def lan_forwarder(self, *, named: bool = True) -> None:
        """16: the resolver is the home router, which asks the ISP. A kill switch that allows the LAN lets it pass.

        75: resolv.conf goes on naming the VPN's nameserver where the router is not `named`.
        """
        if not named:
            self._be(forwarder=True)
            return
        near = DOCKER if self.line.uplink == "docker" else self.line.plan.lan4
        self._be(resolvers=(f"{near}.1",), forwarder=True)

    def public_outside(self, resolver: str = CLOUDFLARE) -> None:
        """18: a public resolver, asked outside the tunnel."""
        self.resolver_outside(resolver)

    def resolver_elsewhere(self) -> None:
        """19: the provider's resolver comes out in another country, in the same network."""
        self._be(resolver_elsewhere=True)

    def two_resolvers_one_leaks(self) -> None:
        """20: the resolver in use and, beside it, the ISP's outside the tunnel."""
        self._be(resolvers=(*self.line.resolvers, ISP_RESOLVER), outside=self.line.outside | {ISP_RESOLVER})

    def transparent_proxy(self, where: str = "home") -> None:
        """21: port 53 is diverted: by the home router to the ISP ("home"), or inside the tunnel ("provider").

        The home router sees only DNS that goes outside the tunnel: combine it with `public_outside`."""
        self._be(**{{"home": "transparent_proxy", "provider": "dns_intercepted"}[where]: True})

    def rewrite_names(self) -> None:
        """The provider's resolver gives names that do not exist an address of its own."""
        self._be(dns_rewritten=True)

    def stop_resolver(self) -> None:
        """22: nothing answers on port 53 through the tunnel."""
        self._be(resolver_stopped=True)

    def block_name(self, *names: str) -> None:
        """23: the resolvers refuse these names (for everybody)."""
        self._be(refused_names=self.line.refused_names | {name.rstrip(".") for name in names})

    def use_resolvers(self, servers: Sequence[str]) -> None:
        """Another /etc/resolv.conf, asked the way routes go."""
        self._be(resolvers=tuple(servers))

    # Routes and IPv6

    def ipv6_outside(self) -> None:
        """24: IPv6 goes out beside the tunnel, past a kill switch that knows IPv4 only."""
        self._be(ipv6="outside")

    def ipv6_dropped(self) -> None:
        """25: IPv6 is there, but a firewall drops it."""
        self._be(ipv6="dropped")

    def split_route(self, *destinations: str) -> None:
        """27: these destinations (default: 1.1.1.1) are routed outside the tunnel."""
        self._be(outside=self.line.outside | set(destinations or (CLOUDFLARE,)))

    def route_outside(self, *prefixes: str) -> None:
        """57, 63, 65, 66: routes of the main table send these prefixes beside the tunnel.

        A prefix that the tunnel has a route for itself (OpenVPN's halves) would replace it: take a longer one there."""
        self._be(routed=self.line.routed | set(prefixes))

    def balance_default(self) -> None:
        """52: one default route over two ways, the tunnel and the uplink (WireGuard)."""
        self._be(balanced=True)

    def no_ipv4_route(self) -> None:
        """69: nothing goes anywhere by IPv4 any more."""
        self._be(no_ipv4=True)

    def mark_outside(self) -> None:
        """60: packets with Tailscale's mark (0x80000 of 0xff0000) go by main, above the tunnel's rule (WireGuard)."""
        self._be(marked=True)

    def rule_outside(self, what: str) -> None:
        """74: a routing rule sends `what` (the selectors of ip-rule(8)) by main, past the tunnel."""
        self._be(ruled=self.line.ruled | {f"pref 75 {what} table main"})

    def firewall_marks(self, what: str) -> None:
        """78: the host's firewall marks `what` (an expression of nft(8)), and a rule leads the mark past the tunnel."""
        self._be(firewalled=what)

    def dscp_outside(self, dscp: int = 46) -> None:
        """81: a rule leads packets of one DSCP value (46 is EF, as telephones send) past the tunnel.

        `lab.dscp.known()` tells whether this kernel has such rules."""
        self._be(dscp=dscp)

    def route_by_object(self, prefix: str) -> None:
        """80, healthy: a route to this prefix names a nexthop object, which leads into the tunnel."""
        self._be(by_object=prefix)

    def turn_object(self) -> None:
        """80: the object of `route_by_object` leads past the tunnel, and no route changes."""
        self._be(object_turned=True)

    def container_networks(self, count: int = 60) -> None:
        """83: this host has networks of so many containers."""
        self._be(networks=count)

    def fail_over(self) -> None:
        """82: the first tunnel dies, and the second WireGuard (`Site(standby=)`) is there or comes up."""
        self._be(tunnel="deleted", standby_tunnel="up")

    def end_both(self) -> None:
        """82: the first tunnel dies, and the second one too."""
        self._be(tunnel="deleted", standby_tunnel="deleted")

    def lease(self, address: str) -> None:
        """76: the router gives the host a further address, such as 93.184.216.99/24, which is somebody else's."""
        self._be(leased=address)

    def publish(self, port: int) -> None:
        """59: the home router forwards a TCP port to the host, and what the host sends from its LAN address goes back
        beside the tunnel."""
        self._be(published=self.line.published | {port})

    def switch_protocol(self) -> None:
        """64: the VPN's program gives one protocol up and takes the other (`Site(other=)`), its kill switch with it."""
        vpn = self.line.vpn
        self._be(vpn=self.other if vpn != self.other else vpn)

    def move_server(self) -> None:
        """79: the VPN's program goes over to the next server of its list, its kill switch with it."""
        self._be(next_server=True)

    def ad_block(self) -> None:
        """55: the system's resolver is a forwarder on this host that answers `whoami.akamai.net` with 0.0.0.0."""
        self._be(answered=("/whoami.akamai.net/0.0.0.0",), names_denied=False, resolvers=("127.0.0.1",))

    def deny_names(self, *names: str) -> None:
        """84: the system's resolver is a forwarder on this host that denies these names (NXDOMAIN), or else all."""
        self._be(answered=tuple(f"/{name}/" for name in names), names_denied=not names, resolvers=("127.0.0.1",))

    # Home

    def home_internet_down(self) -> None:
        """33: the line from the home router to the ISP is cut."""
        self._be(wan_down=True)

    def captive_portal(self) -> None:
        """34: the router lets DNS out, answers web requests itself, and drops the rest."""
        self._be(portal=True)

    def renew_home_address(self) -> str:
        """43: the ISP gives the home another address; returns it."""
        plan = self.line.plan
        self._be(home4=plan.wan4_renewed if self.line.home4 == plan.wan4 else plan.wan4)
        return self.line.home4
