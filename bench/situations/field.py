"""Rows 47 and on: what people reported from the field. States and codes that are right stand here, and only here."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.situations import traffic
from bench.situations.posts import Post, Profile
from bench.situations.trial import Row, Trial, by_fault, by_message, by_replay, by_watching
from lab import dscp, plan
from lab.nodes import Response

LEAKS = frozenset({"ip_leak", "ipv6_leak", "dns_leak", "split_route"})
ALARMS = LEAKS | {"no_traffic", "tunnel_down", "dns_down", "country_mismatch", "resolver_unexpected", "high_loss"}
ROUTED = frozenset({"split_route", "ip_leak"})  # either says it
ROUTED6 = frozenset({"split_route", "ipv6_leak"})
NOT_VERIFIED = "unverified"
NOT_PROTECTED = frozenset({"leaking", NOT_VERIFIED})

APART = "5.9.10.11"  # asked by no canary
BY_OBJECT, ELSEWHERE = "93.184.216.34", "151.101.9.9"  # nobody's in the lab, where nothing answers
EF = 46  # expedited forwarding (RFC 3246), which telephones use
PAGE = 8088
USER = 997
SHORT = 4.0
_OPEN: Mapping[str, Any] = {"kill_switch": False, "lan_server": True}
_LAN: Mapping[str, Any] = {"kill_switch": True, "kill_switch_lan": True, "lan_server": True}
_STRANGE = {"VPN_SENTINEL_HOME_NETWORKS": "", "VPN_SENTINEL_GEO_DB": ""}  # nothing declared, no database
_NO_DATABASE = {"VPN_SENTINEL_GEO_DB": ""}
_BOTH = ("wireguard", "openvpn")
MARKED_PACKETS = f"""
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as program:
    program.setsockopt(socket.SOL_SOCKET, 36, 0x80000)  # SO_MARK
    for _ in range(10):
        program.sendto(b"STUN", ("{APART}", 3478))
        time.sleep(0.5)
"""
NAMES_ASKED = """
import socket, struct, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as program:
    for i in range(20):
        name = b"".join(bytes([len(label)]) + label for label in (b"n%d" % i, b"example", b"com"))
        program.sendto(struct.pack("!6H", i, 0x100, 1, 0, 0, 0) + name + b"\\0\\0\\1\\0\\1", ("ROUTER", 53))
        time.sleep(0.1)
"""


def send_marked(post: Post) -> None:
    """What Tailscale sends by its own mark, past every tunnel's rule."""
    post.site.run([sys.executable, "-c", MARKED_PACKETS], check=True)


def serve_page(post: Post) -> None:
    """A page on this host, which the home router publishes."""
    if not post.site.host.listens(PAGE):
        post.site.spawn([sys.executable, "-m", "http.server", str(PAGE), "--bind", "0.0.0.0"], log="page")
        post.site.host.wait_port(PAGE)
    post.site.publish(PAGE)


def visit(post: Post) -> Response:
    """Somebody on the internet looks at the page."""
    return post.lab.http("srv", "GET", f"http://{post.site.home4}:{PAGE}/", timeout=5)


def _visits(post: Post) -> None:
    for _ in range(5):
        visit(post)
        time.sleep(1)


def _mark_and_send(post: Post) -> None:
    post.site.mark_outside()
    send_marked(post)


def check(post: Post) -> dict[str, Any]:
    """One `check --json` on the post's host, with the agent's settings about home."""
    names = ("VPN_SENTINEL_HOME_NETWORKS", "VPN_SENTINEL_GEO_DB")
    env = {name: post.agent_settings[name] for name in names if post.agent_settings.get(name)}
    done = post.site.run([sys.executable, "-m", "vpn_sentinel", "check", "--json"], env=env, timeout=90)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _check_alone(_: Row, post: Post) -> Trial:
    """48: nothing but `check`; what it cannot know is unknown."""
    trial = Trial()
    found = check(post)
    if found["state"] != "unknown":
        trial.complaints.append(f"check says {found['state']}, tunnel {found['tunnel']}")
    return trial


def _checks_beside(row: Row, post: Post) -> Trial:
    """58: eight checks one after the other, over more than one round of the agent's."""
    trial = Trial()
    began = time.time()
    said = [check(post) for _ in range(8)]
    for found in said:
        if found["state"] != "protected":
            trial.complaints.append(f"check says {found['state']} {[f['code'] for f in found['findings']]}")
    time.sleep(row.quiet)
    if moves := [m["new"] for m in post.moves(began)]:
        trial.complaints.append(f"the agent moved to {moves}")
    if heard := post.heard(began):
        trial.complaints.append(f"told {[m['plain'][:60] for m in heard]}")
    return trial


def _recreated(row: Row, post: Post) -> Trial:
    """53: the agent starts anew with an empty folder while the tunnel is gone and nothing holds packets back."""
    trial = Trial()
    post.agent.stop()
    folder = post.folder / "agent-anew"
    post.agent_settings["VPN_SENTINEL_DATA_DIR"] = str(folder)
    for file in folder.iterdir() if folder.exists() else ():
        file.unlink()
    post.site.delete_tunnel()
    began = time.time()
    post.start_agent()
    found = post.ear.wait(began, lambda f: f.state in NOT_PROTECTED, row.limit)
    if found is None:
        trial.complaints.append(f"neither of {sorted(NOT_PROTECTED)} within {row.limit:g} s: {post.brief()}")
    else:
        trial.verdict = found.time - began
    post.heal()
    post.at_rest(75)
    return trial


def _burst(row: Row, post: Post) -> Trial:
    """67: half a minute of loss. Told while it lasts, and over soon after it."""
    trial = Trial()
    lasts, after = 30.0, 30.0
    began = time.time()
    post.site.loss(30)
    found = post.ear.wait(began, lambda f: f.state == row.state and row.codes <= f.codes, lasts)
    if found is None:
        trial.complaints.append(f"no {row.state} while it lasted: {post.brief()}")
    else:
        trial.verdict = found.time - began
    time.sleep(max(0.0, began + lasts - time.time()))
    if not any("degraded" in m["plain"].lower() for m in post.heard(began)):
        trial.complaints.append("nobody was told while it lasted")
    post.heal()
    over = time.time()
    if post.ear.wait(over, lambda f: f.state == "protected", after) is None:
        trial.complaints.append(f"not over {after:g} s after it: {post.brief()}")
    else:
        trial.recovered = time.time() - over
    for move in post.moves(began):
        if move["new"] not in (row.state, "protected"):
            trial.complaints.append(f"{move['new']} on the way")
    post.at_rest(75)
    return trial


def _names_home(post: Post) -> str | None:
    """The sentence and the facts of a leak name the home address, and not the VPN's own exit as what leaks."""
    leaks = [f for f in post.now().body["findings"] if f["code"] in ROUTED]
    said = " ".join(f"{f['message']} {f['evidence']}" for f in leaks)
    return None if post.site.home4 in said else f"{post.site.home4} is not named: {said[:200]}"


def _only_ipv6(post: Post) -> None:
    post.site.no_ipv4_route()
    post.site.ipv6_outside()


def _restart(post: Post) -> None:
    post.site.kill_openvpn()
    post.site.restore_tunnel()


def _others_talk(post: Post) -> None:
    traffic.call_out(post.site, APART)


def _others_talk_to_the_server(post: Post) -> None:
    traffic.call_out(post.site, post.site.line.endpoint)


def _by_eth0(post: Post) -> None:
    traffic.call_out(post.site, ELSEWHERE, device="eth0")


def _networks_and_by_eth0(post: Post) -> None:
    post.site.container_networks(60)
    _by_eth0(post)


def _calls_by_dscp(post: Post) -> None:
    post.site.dscp_outside(EF)
    traffic.call_out(post.site, ELSEWHERE, dscp=EF)


def _no_dscp() -> str:
    return "" if dscp.known() else "its kernel knows no routing rules by DSCP (Linux 6.12)"


def _turned_and_used(post: Post) -> None:
    post.site.turn_object()
    traffic.call_out(post.site, BY_OBJECT)


def _exit_is_the_seconds(post: Post) -> str | None:
    seen, right = post.now().exit4, post.site.standby_exit4
    return None if seen == right else f"exit {seen} and not {right}"


def _packet_told(post: Post) -> str | None:
    """Among what is told is a packet, and not only what routes say."""
    told = [f["evidence"] for f in post.now().body["findings"] if f["code"] == "split_route"]
    return None if any("packets" in evidence for evidence in told) else f"no packet is told: {told}"


def _asks_the_router(post: Post) -> None:
    """A program with a nameserver of its own, the home router, which asks the ISP; resolv.conf names the VPN's."""
    post.site.lan_forwarder(named=False)
    program = NAMES_ASKED.replace("ROUTER", post.site.router4)
    post.site.run([sys.executable, "-c", program], check=True)


PROFILES: dict[str, Profile] = {
    "rootless": Profile(site={"kill_switch": False, "uplink": "rootless"}, agent=_STRANGE),
    "novpn": Profile(site={"vpn": None, "uplink": "rootless"}, agent=_STRANGE, watched=False),
    "ppp": Profile(site={"kill_switch": False, "uplink": "ppp"}, agent=_STRANGE),
    "twonets": Profile(site={"kill_switch": True, "uplink": "two"}),
    "bare": Profile(site={"kill_switch": False, "uplink": "bare"}, interval=SHORT),
    "balanced": Profile(site=_OPEN),
    "anew": Profile(site=_OPEN, agent=_STRANGE, interval=SHORT),
    "nodb": Profile(site=_LAN, agent=_NO_DATABASE),
    "dockerdns": Profile(site={"kill_switch": False, "uplink": "docker"}, agent=_NO_DATABASE),
    "blocked": Profile(site=_LAN, interval=SHORT),
    "routes": Profile(site=_OPEN),
    "beside": Profile(site=_LAN),
    "page": Profile(site=_OPEN, ready=serve_page),
    "marks": Profile(site=_OPEN),
    "oneuser": Profile(site={"kill_switch": False, "user": USER}, user=USER),
    "wrapped": Profile(site={**_OPEN, "vpn": "wireguard-tcp"}),
    "hostroute": Profile(site={**_OPEN, "vpn": "openconnect"}),
    "switching": Profile(site={**_LAN, "other": "openvpn-tcp"}),
    "burst": Profile(site=_LAN),
    "narrow": Profile(site=_LAN),
    "byname": Profile(site={"kill_switch": False}, agent={"VPN_SENTINEL_URL": f"http://{plan.SRV_NAME}:{{port}}"}),
    "wginov": Profile(site={**_OPEN, "vpn": "wireguard-in-openvpn"}),
    "ovinwg": Profile(site={**_OPEN, "vpn": "openvpn-in-wireguard"}),
    "killed": Profile(site={**_OPEN, "vpn": "openconnect", "ipv6": "none"}),
    "again": Profile(site=_LAN),
    "servers": Profile(site={**_LAN, "next_server": True}),
    "serversopen": Profile(site={**_OPEN, "next_server": True}),
    "objects": Profile(site=_OPEN, ready=lambda post: post.site.route_by_object("93.0.0.0/8")),
    "standby": Profile(site={**_OPEN, "standby": "ch", "resolver": "public"}, agent=_STRANGE),
    "fetched": Profile(site={**_LAN, "standby": "ch", "standby_waits": True, "resolver": "public"}),
    "networks": Profile(site=_OPEN, ready=lambda post: post.site.container_networks(60)),
    "udponly": Profile(site={**_LAN, "kill_switch_udp_only": True}),
}


def _do(name: str, *words: Any) -> Callable[[Post], object]:
    return lambda post: getattr(post.site, name)(*words)


def _leak(number: int, post: str, title: str, codes: set[str], fault: Callable[[Post], object], **more: Any) -> Row:
    given: dict[str, Any] = {"codes": frozenset(codes), "way": by_fault, "rest": 10.0, "kinds": _BOTH} | more
    return Row(number=number, post=post, title=title, state="leaking", fault=fault, told="leaking", **given)


def _quiet(number: int, post: str, title: str, fault: Callable[[Post], object] | None = None, **more: Any) -> Row:
    given: dict[str, Any] = {"never": ALARMS, "quiet": 15.0, "way": by_watching} | more
    return Row(number=number, post=post, title=title, state="protected", fault=fault, **given)


_AT_ONCE: Mapping[str, Any] = {"median": 0.5, "worst": 1.0}
_ONE = ("wireguard",)
_BY_RULE = ("wireguard", "wg-quick")
_BY_ROUTE = tuple(kind for kind in plan.KINDS if kind != "strongswan")  # table 220 comes before main
ROWS: tuple[Row, ...] = (
    _leak(47, "rootless", "rootless container, uplink tap0: tunnel deleted", {"ip_leak"}, _do("delete_tunnel")),
    Row(number=48, post="novpn", title="check without a VPN on tap0", state="unknown", way=_check_alone, kinds=_ONE),
    _leak(49, "ppp", "uplink ppp0: tunnel deleted", {"ip_leak"}, _do("delete_tunnel")),
    _quiet(50, "twonets", "kill switch on one of two networks", codes=frozenset({"killswitch_open"})),
    Row(number=51, post="bare", title="host route only, tunnel dead", state="silent", way=by_replay, told="silent",
        fault=_do("block_endpoint"), codes=frozenset({"no_traffic"}), never=LEAKS | {"uplink_down"}, limit=25,
        kinds=_BY_RULE, note="no way out is left: *silent*, and the replay says *down*"),
    _leak(52, "balanced", "default route over two ways", set(), _do("balance_default"), one_of=ROUTED, kinds=_ONE,
          check=_names_home),
    Row(number=53, post="anew", title="recreated without a volume", state=NOT_VERIFIED, way=_recreated, limit=40,
        note="*leaking* is right as well"),
    _leak(54, "nodb", "own link's forwarder asks the ISP, no database", {"dns_leak"}, _do("lan_forwarder"), limit=35,
          never=frozenset({"ip_leak", "ipv6_leak"})),
    _leak(54, "dockerdns", "the same at 172.17.0.1", {"dns_leak"}, _do("lan_forwarder"), part="b", limit=35,
          never=frozenset({"ip_leak", "ipv6_leak"})),
    _quiet(55, "blocked", "ad blocker answers a whoami name", _do("ad_block"), quiet=20.0),
    Row(number=56, post="blocked", title="no nameserver in resolv.conf", state="degraded", way=by_fault, limit=60,
        fault=_do("use_resolvers", ()), told="degraded", codes=frozenset({"dns_down"}), never=LEAKS),
    _leak(57, "routes", "half of IPv4 outside", {"split_route"}, _do("route_outside", "128.0.0.0/1"),
          never=frozenset({"dns_leak"}), kinds=_BY_RULE),
    Row(number=58, post="beside", title="check beside an agent", state="protected", way=_checks_beside, quiet=10.0),
    _quiet(59, "page", "published page is visited", _visits),
    _quiet(60, "marks", "marked packets go by main", _mark_and_send, kinds=_BY_RULE),
    _quiet(61, "oneuser", "only one user by the VPN", _others_talk, kinds=_ONE),
    _quiet(62, "wrapped", "WireGuard inside TCP", kinds=_ONE),
    _leak(62, "wrapped", "the same, deleted", {"ip_leak"}, _do("delete_tunnel"), part="b", kinds=_ONE),
    _leak(63, "hostroute", "host route that is not the VPN's", {"split_route"}, _others_talk, kinds=_ONE,
          prepare=_do("route_outside", f"{APART}/32"), needs_watch=True, **_AT_ONCE),
    _leak(63, "hostroute", "the VPN server's own host, another port", {"split_route"}, _others_talk_to_the_server,
          part="b", kinds=_ONE, needs_watch=True, **_AT_ONCE),
    _leak(63, "routes", "the same, OpenVPN", {"split_route"}, _others_talk_to_the_server, part="c",
          kinds=("openvpn", "openvpn-tcp", "openvpn-tap"), needs_watch=True, **_AT_ONCE),
    _quiet(64, "switching", "another protocol, kill switch", _do("switch_protocol"), kinds=_ONE,
           never=LEAKS, passing=frozenset({"down", "degraded"})),
    _leak(65, "routes", "one /24 outside, no packet yet", {"split_route"}, _do("route_outside", "5.9.10.0/24"),
          kinds=_BY_ROUTE, limit=45),
    _leak(66, "routes", "2000::/4 outside", set(), _do("route_outside", "2000::/4"), one_of=ROUTED6,
          never=frozenset({"dns_leak"}), kinds=_BY_RULE),
    Row(number=67, post="burst", title="30 % lost for 30 s", state="degraded", way=_burst,
        codes=frozenset({"high_loss"})),
    Row(number=68, post="narrow", title="1,200 bytes at most, second way", state="degraded", way=by_fault, limit=150,
        fault=_do("mtu_black_hole", 1200), told="degraded", codes=frozenset({"mtu_blackhole"}),
        never=LEAKS | {"no_reports"}),
    _leak(69, "byname", "no IPv4 route, IPv6 from home", {"ipv6_leak"},
          _only_ipv6, limit=30),
    _quiet(70, "wginov", "WireGuard inside OpenVPN", kinds=_ONE),
    _quiet(70, "ovinwg", "OpenVPN inside WireGuard", kinds=_ONE, part="b"),
    _leak(70, "wginov", "WireGuard inside OpenVPN, both ended", {"ip_leak"}, _do("delete_tunnel"), part="c",
          kinds=_ONE),
    Row(number=71, post="killed", title="OpenConnect killed, no default left", state="down", way=by_fault,
        told="down", fault=_do("kill_openvpn"), codes=frozenset({"tunnel_down"}), never=LEAKS, rest=10.0, kinds=_ONE,
        opens=True, note="the repair brings home's default route back before the tunnel"),
    _quiet(72, "again", "client restarted, kill switch", _restart, never=LEAKS, kinds=tuple(plan.KINDS),
           passing=frozenset({"down", "degraded"})),
    _quiet(73, "udponly", "kill switch for datagrams only", codes=frozenset({"killswitch_open"})),
    _leak(73, "udponly", "the same, deleted", {"ip_leak"}, _do("delete_tunnel"), part="b"),
    _leak(74, "routes", "only DNS by a rule", {"dns_leak"}, _do("rule_outside", "ipproto udp dport 53"),
          never=frozenset({"ip_leak"}), kinds=_BY_RULE, limit=45),
    _leak(75, "nodb", "a program asks the router itself", {"dns_leak"}, _asks_the_router, needs_watch=True, limit=35,
          never=frozenset({"ip_leak", "ipv6_leak"})),
    _leak(76, "routes", "a stranger's router gives out the internet's addresses", {"split_route"},
          _do("lease", "93.184.216.99/24")),
    _leak(77, "routes", "a rule sends people's packets outside", {"split_route"},
          _do("rule_outside", "uidrange 1000-60000"), kinds=_BY_RULE),
    _leak(78, "routes", "a firewall marks HTTPS, and a rule leads the mark outside", {"split_route"},
          _do("firewall_marks", "tcp dport 443"), kinds=_BY_RULE),
    _quiet(79, "servers", "the next server of a list, kill switch", _do("move_server"), never=LEAKS,
           kinds=_ONE),
    _quiet(79, "serversopen", "the same, no kill switch", _do("move_server"), never=LEAKS, part="b", kinds=_ONE),
    _leak(80, "objects", "a route's nexthop object turns outside", {"split_route"}, _do("turn_object")),
    _leak(80, "objects", "the same, and a program sends there", {"split_route"}, _turned_and_used, part="b",
          check=_packet_told, needs_watch=True),
    _leak(81, "routes", "a rule by DSCP leads outside, no packet yet", {"split_route"}, _do("dscp_outside", EF),
          lacks=_no_dscp),
    _leak(81, "routes", "the same, and a program sends such packets", {"split_route"}, _calls_by_dscp, part="b",
          check=_packet_told, needs_watch=True, lacks=_no_dscp),
    Row(number=82, post="standby", title="a second VPN takes over", state="protected", way=by_message, told="address",
        fault=_do("fail_over"), never=ALARMS, check=_exit_is_the_seconds, rest=10.0, quiet=10.0),
    Row(number=82, part="b", post="fetched", title="a second VPN is started for it, kill switch", state="protected",
        way=by_message, told="address", fault=_do("fail_over"), never=LEAKS, check=_exit_is_the_seconds, rest=10.0,
        passing=frozenset({"down", "degraded"}), quiet=10.0),
    _leak(82, "standby", "both VPNs end", {"ip_leak"}, _do("end_both"), part="c"),
    _quiet(83, "routes", "sixty containers' networks come", _do("container_networks", 60)),
    _leak(83, "networks", "beside sixty networks, a packet by eth0", {"split_route"}, _by_eth0, part="b",
          needs_watch=True, **_AT_ONCE),
    _leak(83, "routes", "sixty networks come, and a packet at once", {"split_route"}, _networks_and_by_eth0, part="c",
          needs_watch=True, limit=3, median=1.0, worst=2.0),
    Row(number=84, post="blocked", title="the resolver denies every name", state="degraded", way=by_fault, limit=60,
        fault=_do("deny_names"), told="degraded", codes=frozenset({"dns_down"}), never=LEAKS,
        note="*degraded* counts after 15 s"),
    _quiet(84, "blocked", "an ad blocker denies some names", part="b", quiet=20.0,
           fault=_do("deny_names", "akamai.net", "google.com", "ipinfo.io")),
)  # fmt: skip
