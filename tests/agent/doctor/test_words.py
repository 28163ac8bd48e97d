"""What each check says of given facts: no I/O."""

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path as FilePath

import pytest

from tests.agent.doubles import ETH, LO, WG
from vpn_sentinel.agent.containment.containment import Mode
from vpn_sentinel.agent.doctor import machine, network, places, reactions, server, tunnel
from vpn_sentinel.agent.doctor.check import Check, CheckState, gap, ok
from vpn_sentinel.agent.doctor.context import Greeting
from vpn_sentinel.agent.doctor.network import FamilyRoute, NameserverRoute
from vpn_sentinel.agent.introspect.wireguard import Device, DeviceError, Peer
from vpn_sentinel.agent.leakwatch.meant import MeantOutside, parse_meant
from vpn_sentinel.agent.net.endpoints import parse_endpoint
from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.domain.observation import (
    Answer,
    Canary,
    Observation,
    Path,
    Probe,
    ResolverSighting,
    Routed,
    SystemLookup,
    Trigger,
)
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.wire.messages import Welcome

OK, GAP, UNKNOWN = CheckState.OK, CheckState.GAP, CheckState.UNKNOWN
URL, NOW, DAY = "https://sentinel.example", 1_800_000_000.0, 86400.0
HOME, EXIT, EGRESS = (ip_address(a) for a in ("198.51.100.7", "203.0.113.4", "203.0.113.53"))
DECLARED = Policy(home_networks=(ip_network("198.51.100.7"),))
SURVEY = Survey(interfaces=(LO, ETH, WG), tunnel="wg0", uplinks=(ETH,), beside=(ETH,))
WELCOME = Welcome(ack=0, wall=NOW)


def canary(probe: Probe, answer: Answer, family: int = 4) -> Canary:
    return Canary(probe=probe, target="cloudflare", family=family, answer=answer, path=Path.OUTSIDE)


def seen(*found: Canary) -> Observation:
    return Observation(trigger=Trigger.START, canaries=found)


def sighting(answer: Answer = Answer.ANSWERED, egress: bool = True) -> ResolverSighting:
    return ResolverSighting(
        method="google", nameserver=ip_address("10.0.0.1"), answer=answer, egress=EGRESS if egress else None
    )


def resolver(path: Path, *seen: ResolverSighting, allowed: bool = False, tunnel: str | None = "wg0") -> list[Check]:
    return network.about_resolvers([NameserverRoute(ip_address("10.0.0.1"), path, allowed)], seen, tunnel=tunnel)


def stub(address: str, *, egress: bool = True) -> list[Check]:
    found = replace(sighting(egress=egress), nameserver=ip_address(address))
    return network.about_resolvers([NameserverRoute(ip_address(address), Path.LOCAL)], [found], tunnel="wg0")


def routes(four: Path, six: Path, tunnel: str | None = "wg0") -> list[Check]:
    devices = {Path.TUNNEL: "wg0", Path.OUTSIDE: "eth0", Path.UNKNOWN: None}
    return network.about_routes(FamilyRoute(4, four, devices[four]), FamilyRoute(6, six, devices[six]), tunnel=tunnel)


def kill_switch(*found: Canary, tunnel_: str | None = "wg0") -> Check:
    return tunnel.about_kill_switch(seen(*found), tunnel_, "eth0")


def greeted(status: int | None, *, welcome: bool = False, why: str = "", has_key: bool = True) -> Check:
    greeting = Greeting(url=URL, status=status, why=why, welcome=WELCOME if welcome else None)
    return server.about_server("server", greeting, has_key=has_key)


def clock(date: float | None, *, exact: bool = True) -> Check:
    greeting = Greeting(
        url=URL, status=200, welcome=WELCOME if exact else None, date=date, sent_at=NOW, received_at=NOW + 0.2
    )
    return machine.about_clock([greeting])


OUTSIDE6 = canary(Probe.FIRST_HOP, Answer.EXPIRED, 6)
WATCHED = parse_endpoint("198.51.100.9:51820")
_ON = next(m for m in Mode if m is not Mode.OFF)
RAW, BOTH = 1 << 13, 1 << 13 | 1 << 12

# What is the case -> what is said of it -> state -> words of what is found, means or fix
CASES: dict[str, tuple[Check | Sequence[Check], list[CheckState], str]] = {
    "an old Python": (machine.about_system("Linux", "6.1", (3, 10, 2)), [GAP], "needs Python 3.11"),
    "not Linux": (machine.about_system("Darwin", "24", (3, 12, 0)), [GAP], "on Linux"),
    "a good system": (machine.about_system("Linux", "6.1", (3, 14, 0)), [OK], "3.14.0 on Linux"),
    "all capabilities": (machine.about_capabilities(BOTH, None), [OK, OK], "packet socket opens"),
    "no capability": (machine.about_capabilities(0, "Operation not permitted"), [GAP, GAP], "cap_add: [NET_RAW"),
    "raw, but the sandbox refuses": (machine.about_capabilities(RAW, "Not supported"), [GAP, GAP], "AF_PACKET"),
    "capabilities hidden": (machine.about_capabilities(None, None), [OK, UNKNOWN], "cannot be read"),
    "a user without a name": (machine.about_user(65534, None), [OK], "uid 65534"),
    "a folder that is full of rights": (
        machine.about_folder(FilePath("/d"), "Permission denied", there=True), [GAP], "/d: Permission denied",
    ),
    "a folder yet to be made": (machine.about_folder(FilePath("/d"), None, there=False), [OK], "can be made"),
    "the right time": (clock(NOW + 0.1), [OK], "agrees"),
    "the right time by HTTP's coarse date": (clock(NOW - 0.9, exact=False), [OK], "agrees"),
    "an hour behind": (clock(NOW + 3600), [GAP], "3600 s behind"),
    "a minute ahead": (clock(NOW - 60), [GAP], "60 s ahead"),
    "nobody to compare with": (clock(None), [UNKNOWN], "no server"),
    "settings of use": (machine.about_settings(()), [OK], "all"),
    "one that does nothing": (machine.about_settings((), ("A: does nothing without B",)), [GAP], "A: does nothing"),
    "two that are not": (machine.about_settings(("A: x", "B: y")), [GAP, GAP], "A: x"),
    "no netlink": (network.about_interfaces(Survey(), None), [GAP], "AF_NETLINK"),
    "a tunnel": (network.about_interfaces(SURVEY, None), [OK, OK], "wg0, kind wireguard: traffic to the internet"),
    "a tunnel by its setting": (network.about_interfaces(SURVEY, "wg0"), [OK, OK], "as configured"),
    "a setting that names the way out": (
        network.about_interfaces(replace(SURVEY, misnamed="eth0"), "eth0"), [GAP, OK], "names eth0, the uplink of",
    ),
    "no tunnel": (
        network.about_interfaces(Survey(interfaces=(LO, ETH), uplinks=(ETH,)), None),
        [GAP, OK],
        "network_mode: service",
    ),
    "no interface at all": (network.about_interfaces(Survey(interfaces=(LO,)), None), [GAP, UNKNOWN], "none besides"),
    "a tunnel that is gone": (
        network.about_interfaces(Survey(interfaces=(LO, ETH), tunnel="wg7", uplinks=(ETH,)), "wg7"), [GAP, OK],
        "wg7 (as configured) does not exist",
    ),
    "a tunnel switched off": (
        network.about_interfaces(replace(SURVEY, interfaces=(LO, ETH, replace(WG, flags=0))), None), [GAP, OK],
        "switched off",
    ),
    "both through the tunnel": (routes(Path.TUNNEL, Path.TUNNEL), [OK, OK], "by wg0"),
    "no IPv6": (routes(Path.TUNNEL, Path.UNKNOWN), [OK, OK], "nothing can leave by IPv6"),
    "IPv6 beside": (routes(Path.TUNNEL, Path.OUTSIDE), [OK, GAP], "by eth0: beside wg0 while IPv4 goes through it"),
    "all beside": (routes(Path.OUTSIDE, Path.OUTSIDE), [GAP, GAP], "AllowedIPs"),
    "offline": (routes(Path.UNKNOWN, Path.UNKNOWN), [GAP, OK], "offline"),
    "routes without a tunnel": (routes(Path.OUTSIDE, Path.OUTSIDE, None), [UNKNOWN, UNKNOWN], "no tunnel is known"),
    "no nameserver": (network.about_resolvers((), (), tunnel="wg0"), [GAP], "names none"),
    "the VPN's resolver": (resolver(Path.TUNNEL, sighting()), [OK], "; it queries the internet from 203"),
    "a resolver beside": (resolver(Path.OUTSIDE, sighting()), [GAP], "VPN_SENTINEL_ALLOWED_RESOLVERS"),
    "one beside that is allowed": (resolver(Path.OUTSIDE, sighting(), allowed=True), [OK], "beside the tunnel"),
    "a resolver without a tunnel": (resolver(Path.OUTSIDE, sighting(), tunnel=None), [UNKNOWN], "no tunnel"),
    "a silent resolver": (resolver(Path.TUNNEL, sighting(Answer.LOST, egress=False)), [GAP], "does not answer"),
    "a resolver nobody asked": (resolver(Path.TUNNEL), [GAP], "does not answer"),
    "systemd's stub": (stub("127.0.0.53"), [OK], "systemd-resolved"),
    "Docker's stub": (stub("127.0.0.11", egress=False), [UNKNOWN], "Docker"),
    "some forwarder": (stub("127.0.0.1"), [OK], "a forwarder on this host"),
    "a kill switch": (kill_switch(canary(Probe.PHYSICAL, Answer.BLOCKED)), [OK], "refuses to send by eth0"),
    "an open way": (kill_switch(canary(Probe.PHYSICAL, Answer.ANSWERED), OUTSIDE6), [GAP], "IPv4 and IPv6 get out"),
    "open for one hop": (kill_switch(canary(Probe.PHYSICAL, Answer.BLOCKED), OUTSIDE6), [GAP], "open: IPv6"),
    "dropped in silence": (kill_switch(canary(Probe.PHYSICAL, Answer.LOST)), [OK], "nothing that was sent"),
    "not permitted to try": (kill_switch(canary(Probe.PHYSICAL, Answer.UNKNOWN)), [UNKNOWN], "CAP_NET_RAW"),
    "no tunnel to switch": (kill_switch(tunnel_=None), [UNKNOWN], "takes a tunnel"),
    "home is declared": (
        tunnel.about_home(DECLARED, Policy()), [OK], "198.51.100.7/32",
    ),
    "home is learned": (
        tunnel.about_home(Policy(), DECLARED), [OK], "learned",
    ),
    "home is unknown": (tunnel.about_home(Policy(), Policy()), [GAP], "VPN_SENTINEL_HOME_NETWORKS"),
    "the watch knows the far end": (
        tunnel.about_leak_watch(["eth0"], [WATCHED], recognized=True), [OK], "198.51.100.9:51820/udp",
    ),
    "the watch knows a mark": (tunnel.about_leak_watch(["eth0"], [], recognized=True), [OK], "by their mark"),
    "the watch knows nothing": (tunnel.about_leak_watch(["eth0"], [], recognized=False), [GAP], "TUNNEL_ENDPOINTS"),
    "names are found": (
        network.about_system_resolver(SystemLookup(answer=Answer.ANSWERED)), [OK], "getaddrinfo finds names",
    ),
    "names are not found": (
        network.about_system_resolver(SystemLookup(answer=Answer.UNREACHABLE, error="EAI_AGAIN")), [GAP], "EAI_AGAIN",
    ),
    "no word of a name yet": (network.about_system_resolver(None), [GAP], "no answer within"),
    "nothing is meant outside": (tunnel.about_meant(MeantOutside()), [], ""),
    "much is meant outside": (
        tunnel.about_meant(parse_meant("published 8000/tcp;port 123/udp;user 7;interface eth1;only user 9")), [OK],
        "answers of port 8000/tcp; what goes to port 123/udp; what user 7 sends; what leaves by eth1; all but what",
    ),
    "nothing to watch": (tunnel.about_leak_watch([], [], recognized=False), [UNKNOWN], "no interface"),
    "WireGuard tells": (
        tunnel.about_wireguard(Device(peers=(Peer(endpoint=WATCHED, handshake=int(NOW) - 30),)), NOW), [OK], "30 s ago",
    ),
    "WireGuard never met": (tunnel.about_wireguard(Device(peers=(Peer(),)), NOW), [OK], "last handshake never"),
    "WireGuard is closed to us": (tunnel.about_wireguard(PermissionError(), NOW), [GAP], "CAP_NET_ADMIN"),
    "WireGuard without its tool": (tunnel.about_wireguard(None, NOW), [GAP], "wireguard-tools"),
    "WireGuard is odd": (tunnel.about_wireguard(DeviceError("no answer in time"), NOW), [UNKNOWN], "no answer in time"),
    "OpenVPN listens": (tunnel.about_openvpn("127.0.0.1:7505", None), [OK], "127.0.0.1:7505"),
    "OpenVPN does not": (tunnel.about_openvpn("/run/x", "No such file"), [GAP], "/run/x: No such file"),
    "gluetun unused": (tunnel.about_no_gluetun(here=True), [GAP], "VPN_SENTINEL_GLUETUN_URL"),
    "no gluetun": (tunnel.about_no_gluetun(here=False), [], ""),
    "gluetun answers": (tunnel.about_gluetun("http://127.0.0.1:8000", 200, ""), [OK], "answers"),
    "gluetun wants a key": (tunnel.about_gluetun("http://127.0.0.1:8000", 401, ""), [GAP], "GLUETUN_API_KEY"),
    "gluetun is away": (tunnel.about_gluetun("http://127.0.0.1:8000", None, "refused"), [GAP], "8000: refused"),
    "a way out": (tunnel.about_way_out([EXIT], (), DECLARED), [OK], "203.0.113.4"),
    "home is seen": (tunnel.about_way_out([HOME], (), DECLARED), [GAP], "198.51.100.7: home"),
    "nobody answers": (tunnel.about_way_out([], [canary(Probe.DEFAULT, Answer.LOST)], DECLARED), [GAP], "nobody"),
    "down behind a kill switch": (
        tunnel.about_way_out([], [canary(Probe.DEFAULT, Answer.BLOCKED)], DECLARED), [GAP], "the kill switch holds",
    ),
    "a server that knows us": (greeted(200, welcome=True), [OK], "accepts the key"),
    "a server that refuses": (greeted(403), [GAP], "refuses the key"),
    "a server without our key": (greeted(401, has_key=False), [GAP], "token create"),
    "somebody else's page": (greeted(200), [GAP], "not answer as our server does"),
    "a wrong path": (greeted(404), [GAP], "API_PATH"),
    "a server that must wait": (greeted(429), [UNKNOWN], "429"),
    "a server without its database": (greeted(503), [GAP], "cannot store"),
    "a server that is away": (greeted(None, why="Connection refused"), [GAP], "Connection refused"),
    "a name that is not": (greeted(None, why="no address found for x"), [GAP], "name in VPN_SENTINEL_URL"),
    "a stranger's certificate": (greeted(None, why="its certificate is not trusted"), [GAP], "VPN_SENTINEL_CA_FILE"),
    "UDP passes": (server.about_echo(5000, [(EXIT, Answer.ANSWERED)]), [OK], "5000 answers at 203.0.113.4"),
    "UDP does not pass": (server.about_echo(5000, [(EXIT, Answer.LOST)]), [GAP], "let UDP 5000 pass"),
    "no zone": (server.about_zone(None, None), [OK], "the server has none"),
    "a zone that works": (server.about_zone("c.example", [None, EGRESS]), [OK], "queried from 203.0.113.53"),
    "a zone that does not": (server.about_zone("c.example", [None]), [GAP], "delegate c.example"),
    "an odd zone": (server.about_zone("c..example", None), [UNKNOWN], "c..example"),
    "no database": (places.about_places([], (), NOW), [GAP], "vpn-sentinel geo update"),
    "a young database": (places.about_places([("dbip:x", int(NOW - DAY))], (), NOW), [OK], "dbip:x, 1 day old"),
    "an old database": (places.about_places([("dbip:x", int(NOW - 50 * DAY))], (), NOW), [GAP], "50 days old: old"),
    "a database of long ago": (places.about_places([("m", int(NOW - 99 * DAY))], (), NOW), [GAP], "much too old"),
    "a database that is not whole": (
        places.about_places([("m", int(NOW))], ["x.mmdb: is damaged"], NOW), [GAP, OK], "x.mmdb: is damaged",
    ),
    "no containment": (reactions.about_containment(Mode.OFF, may=False, nftables=False), [OK], "VPN_SENTINEL_CONTAIN"),
    "containment": (reactions.about_containment(_ON, may=True, nftables=True), [OK], "able to work"),
    "containment without means": (
        reactions.about_containment(_ON, may=False, nftables=False), [GAP], "CAP_NET_ADMIN and nftables missing",
    ),
    "a hook": (reactions.about_hook("/bin/true", runs=True), [OK], "/bin/true"),
    "a hook that is not": (reactions.about_hook("/no", runs=False), [GAP], "/no is missing"),
    "a restart of nobody": (reactions.about_restart(configured=False), [GAP], "GLUETUN_URL"),
    "a restart": (reactions.about_restart(configured=True), [OK], "configured"),
    "torrents": (reactions.about_torrents("qBittorrent", "http://q", None), [OK], "answers"),
    "torrents away": (reactions.about_torrents("qBittorrent", "http://q", "refused"), [GAP], "http://q: refused"),
}  # fmt: skip


@pytest.mark.parametrize(("said", "states", "words"), CASES.values(), ids=CASES.keys())
def test_words(said: Check | Sequence[Check], states: list[CheckState], words: str) -> None:
    checks = [said] if isinstance(said, Check) else list(said)
    assert [c.state for c in checks] == states
    assert words in " | ".join(f"{c.found} {c.means} {c.fix}" for c in checks)
    for check in checks:
        assert check.name
        assert check.found
        assert (check.fix != "") or check.state is not GAP, "a gap has a fix"
        assert check.means or check.state is not GAP, "and says what follows from it"


def test_logins_in_addresses_are_not_repeated() -> None:
    for check in (ok("x", "http://me:s3cret@h/p"), gap("x", "at http://me:s3cret@h: no", "m", "http://me:s3cret@h")):
        assert "s3cret" not in f"{check}"
        assert "://***@h" in check.found


def test_a_name_with_an_address_at_which_nobody_answers() -> None:
    check = server.about_addresses("sentinel.example", 5000, ["2001:db8::5"])
    assert (check.state, check.found) == (CheckState.GAP, "nobody answers at 2001:db8::5 port 5000")
    assert server.about_addresses("sentinel.example", 5000, []).state is CheckState.OK


def test_a_route_that_the_tunnel_shares_is_no_percentage_of_the_traffic() -> None:
    parts = (
        Routed(interface="wg0", family=4, share=1.0),
        Routed(interface="eth0", family=4, share=1.0, networks=(ip_network("0.0.0.0/0"),)),
    )
    (found,) = network.about_bypasses(parts, tunnel="wg0")
    assert "some connections of IPv4" in found.found
    assert "%" not in found.found
    (alone,) = network.about_bypasses((replace(parts[1], share=0.5), replace(parts[0], share=0.5)), tunnel="wg0")
    assert "50 % of IPv4" in alone.found
