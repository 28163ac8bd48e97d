"""A network device as rtnetlink reports it (linux/if.h, linux/if_arp.h, linux/if_link.h)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vpn_sentinel.domain.policy import IPAddress, IPNetwork

IFF_UP, IFF_LOOPBACK, IFF_POINTOPOINT, IFF_LOWER_UP = 0x1, 0x8, 0x10, 0x10000
ARPHRD_PPP, ARPHRD_NONE = 512, 0xFFFE
_FORWARDING: Final = "/proc/sys/net/ipv{}/conf/{}/forwarding"  # ip-sysctl


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A network interface. `kind` is rtnetlink's (`wireguard`, `tun`, `veth`, … or empty); counters are bytes.

    Counters take no part in comparisons: a device is the same whatever it has carried.
    """

    index: int
    name: str
    kind: str = ""
    hardware: int = 0  # ARPHRD_*, 0 when unknown
    flags: int = 0
    rx_bytes: int = field(default=0, compare=False)
    tx_bytes: int = field(default=0, compare=False)
    addresses: tuple[IPAddress, ...] = ()
    master: int | None = None  # the index of the bridge, bond or VRF that it belongs to
    networks: tuple[IPNetwork, ...] = ()  # the networks of its addresses
    mtu: int = 0  # bytes of an IP packet; 0 when unknown


def forwards(device: Interface, version: int) -> bool:
    """Whether this host forwards packets that come in by the device, for one IP version; False if that is unknown."""
    try:
        return Path(_FORWARDING.format(version, device.name)).read_text(encoding="ascii").strip() == "1"
    except OSError:
        return False
