"""How a site's host is connected to its home router: which device, which address, which way out.

| kind | what it is like |
|---|---|
| lan | a machine or a container on the home's LAN, `eth0` |
| docker | the same on Docker's usual network, 172.17.0.0/16, whose gateway is 172.17.0.1 |
| two | a container on two networks, `eth0` and `eth1`; the second default route has the higher metric |
| bare | a LAN without a default route: nothing but a host route to the VPN server |
| rootless | a rootless container: `tap0` by slirp4netns, which sends everything from sockets of its own |
| ppp | a line like PPPoE: `ppp0`, point to point, no neighbours, 1,492 bytes |
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.plan import HomePlan
from lab.rules import DOCKER


@dataclass(frozen=True)
class Uplink:
    """One kind, with a home's addresses. `address` is None where the device is configured by what makes it."""

    kind: str
    interface: str
    host4: str
    address: str | None
    gateway: str | None
    ipv6: bool = False
    """Whether the home's IPv6 is there as well."""

    @property
    def way(self) -> str:
        """The way out, as `ip route` says it."""
        return f"via {self.gateway} dev {self.interface}" if self.gateway else f"dev {self.interface}"


def uplink(kind: str, home: HomePlan) -> Uplink:
    """The uplink of one home. ValueError for a kind that does not exist."""
    here, router = f"{home.lan4}.10", f"{home.lan4}.1"
    match kind:
        case "lan" | "two" | "bare":
            return Uplink(kind, "eth0", here, f"{here}/24", router, ipv6=True)
        case "docker":
            return Uplink(kind, "eth0", f"{DOCKER}.2", f"{DOCKER}.2/16", f"{DOCKER}.1")
        case "rootless":
            return Uplink(kind, "tap0", "10.0.2.100", None, "10.0.2.2")
        case "ppp":
            return Uplink(kind, "ppp0", here, f"{here} peer {router}", None)
        case other:
            raise ValueError(f"no kind of uplink {other!r}")
