"""Who is the tunnel and who the way home, on real devices, rules and routes in a namespace.

Each set-up is what a program or a machine really makes: wg-quick(8), OpenVPN's redirect-gateway, vpnc-script, gluetun,
tailscaled, slirp4netns, a PPP line, two home lines.
"""

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path as Folder

import pytest

from tests.agent.net.test_fib import ip
from vpn_sentinel.agent.net.facts import InMemoryFacts
from vpn_sentinel.agent.net.interfaces import Paths, Survey, Surveyor, survey
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.agent.net.roles import Remembered, roles
from vpn_sentinel.agent.probes.dns import Nameserver, path_to
from vpn_sentinel.agent.rounds.canary_plan import marks_lead_out
from vpn_sentinel.domain.observation import Path

LAN = """
link set lo up
link add eth0 type veth peer name far0
link set eth0 up
link set far0 up
addr add 172.17.0.2/16 dev eth0
"""
GATEWAY = "route add default via 172.17.0.1"
SECOND = """
link add eth1 type veth peer name far1
link set eth1 up
link set far1 up
addr add 172.18.0.2/16 dev eth1
"""
ROOTLESS = """
link set lo up
tuntap add tap0 mode tap
link set tap0 up
addr add 10.0.2.100/24 dev tap0
route add default via 10.0.2.2
"""
PPP_LIKE = """
link set lo up
tuntap add ppp0 mode tun
link set ppp0 up
addr add 83.46.112.77 peer 83.46.112.1 dev ppp0
route add default dev ppp0
"""
WG_QUICK = """
tuntap add {0} mode tun
link set {0} up
addr add 10.2.0.2/32 dev {0}
route add default dev {0} table 51820
rule add not fwmark 51820 table 51820
rule add table main suppress_prefixlength 0
"""
OPENVPN = """
tuntap add {0} mode {1}
link set {0} up
addr add 10.8.0.2/24 dev {0}
route add 198.51.100.7/32 via 172.17.0.1
route add 0.0.0.0/1 via 10.8.0.1 dev {0}
route add 128.0.0.0/1 via 10.8.0.1 dev {0}
"""
OPENCONNECT = """
tuntap add tun0 mode tun
link set tun0 up
addr add 10.9.0.2/32 dev tun0
route add 198.51.100.7/32 via 172.17.0.1 dev eth0
route replace default dev tun0
"""
TAILSCALE = """
tuntap add tailscale0 mode tun
link set tailscale0 up
addr add 100.101.1.2/32 dev tailscale0
route add 100.64.0.0/10 dev tailscale0 table 52
rule add fwmark 0x80000/0xff0000 lookup main pref 5210
rule add lookup 52 pref 5270
"""


@dataclass(frozen=True)
class Case:
    setup: str
    tunnel: str | None
    uplinks: tuple[str, ...]
    remembered: Remembered = field(default_factory=Remembered)
    path: Path = Path.TUNNEL
    configured: str | None = None


AFTER_WG = Remembered(tunnel="wg0", uplinks=frozenset({"tap0", "ppp0", "eth0", "tun0"}))
CASES = {
    "WireGuard as wg-quick makes it": Case(LAN + GATEWAY + WG_QUICK.format("wg0"), "wg0", ("eth0",)),
    "the same by an odd name": Case(LAN + GATEWAY + WG_QUICK.format("eth7"), "eth7", ("eth0",)),
    "OpenVPN": Case(LAN + GATEWAY + OPENVPN.format("tun0", "tun"), "tun0", ("eth0",)),
    "OpenVPN with dev tap": Case(LAN + GATEWAY + OPENVPN.format("tap0", "tap"), "tap0", ("eth0",)),
    "OpenConnect": Case(LAN + GATEWAY + OPENCONNECT, "tun0", ("eth0",)),
    "a host route to the VPN server and no default beside it": Case(
        LAN + "route add 198.51.100.7/32 via 172.17.0.1" + WG_QUICK.format("wg0"), "wg0", ("eth0",)
    ),
    "rootless container": Case(ROOTLESS + WG_QUICK.format("wg0"), "wg0", ("tap0",)),
    "rootless container, tunnel gone": Case(ROOTLESS, "wg0", ("tap0",), AFTER_WG, Path.OUTSIDE),
    "rootless container, tunnel gone, its rules left": Case(
        ROOTLESS + "rule add not fwmark 51820 table 51820", "wg0", ("tap0",), AFTER_WG, Path.OUTSIDE
    ),
    "rootless container without a VPN": Case(ROOTLESS, None, ("tap0",), path=Path.OUTSIDE),
    "the same, remembered wrongly": Case(ROOTLESS, None, ("tap0",), Remembered(tunnel="tap0"), Path.OUTSIDE),
    "PPP line": Case(PPP_LIKE + WG_QUICK.format("wg0"), "wg0", ("ppp0",)),
    "the server is excepted by a rule for it": Case(
        LAN + GATEWAY + """
        tuntap add tun0 mode tun
        link set tun0 up
        addr add 10.8.0.2/24 dev tun0
        route add default dev tun0 table 100
        rule add lookup 100 pref 1000
        rule add to 198.51.100.7 lookup main pref 900""",
        "tun0", ("eth0",),
    ),
    "a default route by a nexthop object": Case(
        LAN + "nexthop add id 7 via 172.17.0.1 dev eth0\nroute add default nhid 7" + WG_QUICK.format("wg0"),
        "wg0", ("eth0",),
    ),
    "a bridge and its ports": Case(
        LAN + """
        link add br0 type bridge
        link set far0 master br0
        link set br0 up
        addr add 192.168.9.2/24 dev br0
        route add default via 192.168.9.1""" + WG_QUICK.format("wg0"),
        "wg0", ("br0", "eth0"),
    ),
    "a blackhole for when the tunnel is gone": Case(
        LAN + GATEWAY + WG_QUICK.format("wg0") + "route add blackhole default table 51820 metric 4096",
        "wg0",
        ("eth0",),
    ),
    "PPP line and OpenVPN": Case(
        PPP_LIKE + """
        tuntap add tun0 mode tun
        link set tun0 up
        addr add 10.8.0.2/24 dev tun0
        route add 198.51.100.7/32 dev ppp0
        route add 0.0.0.0/1 via 10.8.0.1 dev tun0
        route add 128.0.0.0/1 via 10.8.0.1 dev tun0""",
        "tun0", ("ppp0",),
    ),
    "PPP line, tunnel gone": Case(PPP_LIKE, "wg0", ("ppp0",), AFTER_WG, Path.OUTSIDE),
    "PPP line without a VPN": Case(PPP_LIKE, None, ("ppp0",), path=Path.OUTSIDE),
    "PPP line and a second one": Case(
        PPP_LIKE + LAN.replace("link set lo up", "") + "route add default via 172.17.0.1 metric 100", None,
        ("ppp0", "eth0"), path=Path.OUTSIDE,
    ),
    "bare host without a VPN": Case(LAN + GATEWAY, None, ("eth0",), path=Path.OUTSIDE),
    "two networks": Case(
        LAN + SECOND + GATEWAY + "\nroute add default via 172.18.0.1 metric 100" + WG_QUICK.format("wg0"),
        "wg0", ("eth0", "eth1"),
    ),
    "two networks, one default route": Case(LAN + SECOND + GATEWAY + WG_QUICK.format("wg0"), "wg0", ("eth0", "eth1")),
    "Tailscale beside the tunnel": Case(LAN + GATEWAY + WG_QUICK.format("wg0") + TAILSCALE, "wg0", ("eth0",)),
    "Tailscale without a VPN": Case(LAN + GATEWAY + TAILSCALE, None, ("eth0",), path=Path.OUTSIDE),
    "Tailscale's exit node": Case(
        LAN + GATEWAY + TAILSCALE + "route add default dev tailscale0 table 52", "tailscale0", ("eth0",)
    ),
    "a tunnel in a tunnel": Case(
        LAN + GATEWAY + OPENCONNECT + WG_QUICK.format("wg0"), "wg0", ("tun0", "eth0")
    ),
    "the inner one gone": Case(
        LAN + GATEWAY + OPENVPN.format("tun0", "tun"), "wg0", ("tun0", "eth0"), AFTER_WG, Path.OUTSIDE
    ),
    "another program takes over": Case(
        LAN + GATEWAY + OPENVPN.format("tun3", "tun"), "tun3", ("eth0",), AFTER_WG
    ),
    "one half routed outside": Case(
        LAN + GATEWAY + WG_QUICK.format("wg0") + "route add 128.0.0.0/1 via 172.17.0.1 dev eth0 table 51820",
        "wg0", ("eth0",), path=Path.OUTSIDE,
    ),
    "only a company's network": Case(
        LAN + GATEWAY + """
        tuntap add tun0 mode tun
        link set tun0 up
        addr add 10.8.0.2/24 dev tun0
        route add 198.51.100.7/32 via 172.17.0.1
        route add 192.0.0.0/16 dev tun0""",
        None, ("eth0",), path=Path.OUTSIDE,
    ),
    "a company's network of public addresses beside the tunnel": Case(
        LAN + GATEWAY + WG_QUICK.format("wg0") + """
        tuntap add tun1 mode tun
        link set tun1 up
        addr add 10.8.0.2/24 dev tun1
        route add 193.0.0.0/20 dev tun1""",
        "wg0", ("eth0",), path=Path.UNKNOWN,
    ),
    "an overlay of public addresses, as ZeroTier and Hamachi may have one": Case(
        LAN + GATEWAY + WG_QUICK.format("wg0") + """
        tuntap add zt0 mode tap
        link set zt0 up
        addr add 193.0.0.5/8 dev zt0""",
        "wg0", ("eth0",), path=Path.UNKNOWN,
    ),
    "a line's TUN that the tunnel's own packets leave by": Case(
        PPP_LIKE + OPENCONNECT.replace("via 172.17.0.1 dev eth0", "dev ppp0"), "tun0", ("ppp0",)
    ),
    "a rootless container's TAP whose default route the tunnel took": Case(
        ROOTLESS + OPENCONNECT.replace("via 172.17.0.1 dev eth0", "via 10.0.2.2"), "tun0", ("tap0",)
    ),
    "a name that is configured": Case(
        LAN + GATEWAY, "vpn7", ("eth0",), path=Path.OUTSIDE, configured="vpn7"
    ),
}  # fmt: skip


def look(case: Case) -> tuple[Survey, Path]:
    kernel = Netlink()
    try:
        found = survey(kernel, configured=case.configured, remembered=case.remembered)
        return found, Paths(kernel, found).of(ip_address("193.0.14.129"))
    finally:
        kernel.close()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_roles_follow_from_what_carries_what(namespace: None, case: Case) -> None:
    ip(case.setup)
    found, path = look(case)
    assert (found.tunnel, tuple(i.name for i in found.uplinks), path) == (case.tunnel, case.uplinks, case.path)


STANDBY = """
tuntap add wg9 mode tun
link set wg9 up
addr add 10.9.0.2/32 dev wg9
route add default dev wg9 table 51820 metric 500
"""
BESIDE_OPENVPN = """
tuntap add wg9 mode tun
link set wg9 up
addr add 10.9.0.2/32 dev wg9
route add default dev wg9 table 51821
rule add pref 32000 not fwmark 51820 lookup 51821
rule add pref 31000 lookup main suppress_prefixlength 0
"""


@pytest.mark.parametrize(
    ("setup", "known", "tunnel", "uplinks"),
    [
        (WG_QUICK.format("wg0") + STANDBY, "wg0", "wg0", ["eth0"]),
        (WG_QUICK.format("wg0") + STANDBY + "link del wg0", "wg0", "wg9", ["eth0"]),
        (OPENVPN.format("tun0", "tun") + BESIDE_OPENVPN, "tun0", "tun0", ["eth0"]),
        (OPENVPN.format("tun0", "tun") + BESIDE_OPENVPN + "link del tun0", "tun0", "wg9", ["eth0"]),
        # wg0's own packets leave by wg9: that one is the way out, here as for any other device.
        (WG_QUICK.format("wg9") + WG_QUICK.format("wg0").replace("51820", "51821"), "wg0", "wg0", ["wg9", "eth0"]),
        # Nothing says that a TUN device is a VPN's: it may be a line.
        (WG_QUICK.format("wg0") + STANDBY.replace("wg9", "tun9"), "wg0", "wg0", ["tun9", "eth0"]),
    ],
    ids=["stands by", "took over", "below OpenVPN", "OpenVPN ended", "outer", "TUN"],
)
def test_a_second_vpn_that_stands_by_is_no_way_home(
    namespace: None, setup: str, known: str, tunnel: str, uplinks: list[str]
) -> None:
    """A failover, as people make it with metrics or tables: what leaves by the second VPN is not at home."""
    ip(LAN + GATEWAY + setup)
    kernel = Netlink()
    try:
        found = roles(
            kernel.interfaces(),
            kernel.fib(),
            remembered=Remembered(tunnel=known, uplinks=frozenset({"eth0"})),
            claimed=lambda name: name.startswith("wg"),
        )
    finally:
        kernel.close()
    assert (found.tunnel, [i.name for i in found.uplinks], found.carries) == (tunnel, uplinks, True)


def test_no_way_to_ask_is_known(namespace: None) -> None:
    """A way out with nothing but the VPN server's route is no way to ask whether home's line works."""
    ip(LAN + "route add 198.51.100.7/32 via 172.17.0.1" + WG_QUICK.format("wg0"))
    ip(SECOND + "route add default via 172.18.0.1")
    kernel = Netlink()
    try:
        found = survey(kernel)
        paths = Paths(kernel, found)
        ways = {i.name: paths.can_route(i, ip_address("1.1.1.1")) for i in found.uplinks}
    finally:
        kernel.close()
    assert ways == {"eth0": False, "eth1": True}


@pytest.mark.parametrize(
    ("more", "name", "declared"),
    [
        ("", "eth0", True),
        (WG_QUICK.format("wg0"), "wg0", False),
        (OPENCONNECT, "tun0", False),
        (WG_QUICK.format("wg0"), "wg9", False),  # not there, and down by that
    ],
)
def test_an_owners_word_for_what_nothing_else_shows_is_marked(
    namespace: None, more: str, name: str, declared: bool
) -> None:
    ip(LAN + GATEWAY + more)
    kernel = Netlink()
    try:
        link = survey(kernel, configured=name).link()
        assert link is not None
        assert link.declared is declared
    finally:
        kernel.close()


@pytest.mark.parametrize(
    ("setup", "named", "tunnel"),
    [
        (LAN + GATEWAY + WG_QUICK.format("wg0"), "eth0", "wg0"),
        (LAN + GATEWAY + OPENVPN.format("tun0", "tun"), "eth0", "tun0"),
        (LAN + OPENCONNECT, "eth0", "tun0"),
        (ROOTLESS + WG_QUICK.format("wg0"), "tap0", "wg0"),
        (LAN + GATEWAY, "eth0", "eth0"),  # the VPN is the router's
        (LAN + GATEWAY + WG_QUICK.format("wg0"), "wg0", "wg0"),
        # A corporate VPN that leads to its own networks speaks against nothing, nor does one that is switched off.
        (
            LAN + GATEWAY + "\ntuntap add tun5 mode tun\nlink set tun5 up\nroute add 10.66.0.0/16 dev tun5\n",
            "eth0",
            "eth0",
        ),
        (LAN + SECOND + GATEWAY + WG_QUICK.format("wg0"), "eth1", "eth1"),  # no way to the internet, so not wg0's
    ],
)
def test_a_word_that_names_the_uplink_means_the_tunnel_above_it(
    namespace: None, setup: str, named: str, tunnel: str, caplog: pytest.LogCaptureFixture
) -> None:
    ip(setup)
    kernel = Netlink()
    try:
        surveyor = Surveyor(kernel, configured=named)
        found = surveyor.look()
        surveyor.look()
    finally:
        kernel.close()
    assert (found.tunnel, found.misnamed) == (tunnel, None if tunnel == named else named)
    assert len(caplog.records) == (tunnel != named)  # said once


def test_the_tunnel_above_a_named_uplink_is_missed_when_it_goes(namespace: None) -> None:
    """Its traffic goes home then, and the word is not what makes that a tunnel."""
    ip(LAN + GATEWAY + WG_QUICK.format("wg0"))
    kernel = Netlink()
    memory = InMemoryFacts()
    try:
        Surveyor(kernel, configured="eth0", memory=memory).look()
        ip("link del wg0")
        after_a_restart = Surveyor(kernel, configured="eth0", memory=memory).look_anew()
    finally:
        kernel.close()
    link = after_a_restart.link()
    assert link is not None
    assert (link.name, link.present) == ("wg0", False)
    assert [i.name for i in after_a_restart.uplinks] == ["eth0"]


def test_a_new_word_is_believed_over_the_memory_of_another_set_up(namespace: None) -> None:
    """The VPN moved to the router, and the owner says so: the tunnel that was here before is not missed."""
    ip(LAN + GATEWAY + WG_QUICK.format("wg0"))
    kernel = Netlink()
    memory = InMemoryFacts()
    try:
        Surveyor(kernel, memory=memory).look()
        ip("link del wg0")
        surveyor = Surveyor(kernel, configured="eth0", memory=memory)
        found = [surveyor.look_anew().link(), surveyor.look_anew().link()]
    finally:
        kernel.close()
    assert [link and (link.name, link.present, link.declared) for link in found] == [("eth0", True, True)] * 2


BRIDGE = """
link add docker0 type bridge
link add veth0 type veth peer name inside
link set veth0 master docker0
link set veth0 up
link set inside up
link set docker0 up
addr add 172.20.0.1/16 dev docker0
"""
OUT = """
route add default via 172.17.0.1 dev eth0 table 100
rule add pref 900 from 172.20.0.0/16 lookup 100
"""


@pytest.mark.parametrize(
    ("more", "forwards", "path"),
    [
        ("", "1", Path.UNKNOWN),  # its packets go the way of this host's own
        ("", "0", Path.OUTSIDE),  # somebody else is its router
        (OUT, "1", Path.OUTSIDE),
        (OUT.replace("from 172.20.0.0/16", "iif docker0"), "1", Path.OUTSIDE),
        ("route add default via 172.20.0.9 dev docker0 metric 900", "1", Path.OUTSIDE),  # a way out, no container's
    ],
)
def test_a_nameserver_in_a_container_here_goes_where_this_host_takes_it(
    namespace: None, more: str, forwards: str, path: Path
) -> None:
    ip(LAN + GATEWAY + BRIDGE + WG_QUICK.format("wg0") + more)
    Folder("/proc/sys/net/ipv4/conf/docker0/forwarding").write_text(forwards, encoding="ascii")
    kernel = Netlink()
    try:
        paths = Paths(kernel, survey(kernel))
        assert path_to(Nameserver(ip_address("172.20.0.2")), paths) is path
        assert path_to(Nameserver(ip_address("172.17.0.1")), paths) is Path.OUTSIDE
    finally:
        kernel.close()


@pytest.mark.parametrize(
    ("more", "leads"),
    [
        (WG_QUICK.format("wg0"), False),  # the mark of the tunnel's own packets
        (WG_QUICK.format("wg0") + "rule add pref 100 fwmark 7 lookup main", True),
        (WG_QUICK.format("wg0") + TAILSCALE, True),
        (OPENCONNECT, False),
        ("\nrule add pref 100 fwmark 7 lookup main", False),  # no tunnel
    ],
)
def test_marks_that_lead_past_the_tunnel(namespace: None, more: str, leads: bool) -> None:
    ip(LAN + GATEWAY + more)
    kernel = Netlink()
    try:
        assert marks_lead_out(survey(kernel)) is leads
    finally:
        kernel.close()
