"""All rows of the table: where each is tried, what is done, and the only right answer."""

import sys
from collections.abc import Callable
from typing import Any

from bench.situations import field, special, traffic
from bench.situations.posts import Post, Profile
from bench.situations.trial import Row, Way, by_fault, by_message, by_replay, by_watching
from lab import until
from lab.plan import CLOUDFLARE, HOSTS, ISP_RESOLVER_EGRESS, KINDS

SHORT = 4.0  # seconds between rounds where silence or a slow finding is awaited
FORWARDED = 41641
_LAN = {"kill_switch": True, "kill_switch_lan": True, "lan_server": True}
_OPEN = {"kill_switch": False, "lan_server": True}
_KILLED = tuple(kind for kind in KINDS if kind != "wireguard")  # where a killed program is another thing than row 5
EVERY = tuple(KINDS)  # rows that are tried on every kind of tunnel
PORT = {"VPN_SENTINEL_FORWARDED_PORT": str(FORWARDED)}


def _forwarded(post: Post) -> None:
    """What a healthy forwarded port is: open at the provider, and a program that listens."""
    post.site.open_port(FORWARDED)
    if post.status() == {}:  # only once, before the agent starts
        _listen(post, FORWARDED)


def _listen(post: Post, port: int) -> None:
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "0.0.0.0"]
    post.site.spawn(command, log="listener")
    post.site.host.wait_port(port)


def _reference(post: Post) -> None:
    if post.reference is None:
        post.start_reference()


def _gluetun(post: Post) -> None:
    """gluetun's control API as this home's container has it, with no port forwarded."""
    if post.gluetun is None:
        post.gluetun = post.site.gluetun()
        post.agent_settings["VPN_SENTINEL_GLUETUN_URL"] = post.gluetun.url


def _gluetun_with_port(post: Post) -> None:
    """The same with a forwarded port, which is open. Healing leaves the last one, since every change is told."""
    if post.gluetun is None:
        _listen(post, post.port_told)
        post.gluetun = post.site.gluetun(port=post.port_told)
        post.agent_settings["VPN_SENTINEL_GLUETUN_URL"] = post.gluetun.url
    post.site.open_port(post.port_told)


def _next_port(post: Post) -> None:
    """What the VPN has done by the time that gluetun tells another port: it is open, and a program listens."""
    known = "the port to be known, which it may not be a second after the start"
    until(lambda: post.now().body["forwarded_port"] == post.port_told, 20, known, interval=0.1)
    _listen(post, post.port_told + 1)
    post.site.open_port(post.port_told + 1)


def _another_port(post: Post) -> None:
    post.port_told += 1
    post.gluetun.say(port=post.port_told)


_OWN: dict[str, Profile] = {
    "closed": Profile(site=_LAN),
    "open": Profile(site=_OPEN),
    "hole": Profile(site=_OPEN),
    "holetwo": Profile(site=_LAN),
    "names": Profile(site=_OPEN, zone=True, chain="dns"),
    "resolver": Profile(site=_LAN, zone=True, chain="dns", interval=SHORT),
    "forward": Profile(site=_LAN, zone=True, chain="dns"),
    "allowed": Profile(
        site=_LAN, zone=True, chain="dns", agent={"VPN_SENTINEL_ALLOWED_RESOLVERS": ISP_RESOLVER_EGRESS}
    ),
    "public": Profile(site={**_LAN, "resolver": "public"}, zone=True, chain="dns", interval=SHORT),
    "six": Profile(site=_OPEN),
    "dropped": Profile(site={**_LAN, "ipv6": "dropped"}),
    "idle": Profile(site={**_LAN, "keepalive": 0}),
    "place": Profile(site=_OPEN, chain="place", interval=SHORT, agent={"VPN_SENTINEL_EXPECTED_COUNTRIES": "NL,BE"}),
    # Without a database, so that the services are asked.
    "doubt": Profile(
        site=_OPEN,
        chain="place",
        interval=SHORT,
        agent={"VPN_SENTINEL_EXPECTED_COUNTRIES": "NL,BE", "VPN_SENTINEL_GEO_DB": ""},
    ),
    "split": Profile(site=_OPEN),
    "gone": Profile(site=_LAN, interval=SHORT),
    "away": Profile(site=_LAN, interval=SHORT),
    "home": Profile(site={**_LAN, "reference": True}, ready=_reference),
    "moving": Profile(site={**_OPEN, "reference": True}, ready=_reference),
    # Behind a kill switch no portal can be asked, and the tunnel reads as dead.
    "portal": Profile(site=_OPEN),
    "size": Profile(site=_LAN),
    "lossy": Profile(site=_LAN),
    "full": Profile(site=_LAN),
    "port": Profile(site=_LAN, agent=PORT, ready=_forwarded),
    "gluetun": Profile(site=_LAN, ready=_gluetun),
    "given": Profile(site=_LAN, ready=_gluetun_with_port),
    "flap": Profile(site=_LAN, server={"VPN_SENTINEL_FLAP_CALM": "60"}),
}
if _TWICE := _OWN.keys() & field.PROFILES.keys():
    raise ValueError(f"two posts of one name: {', '.join(_TWICE)}")
PROFILES = _OWN | field.PROFILES


def _do(name: str, *words: Any, **more: Any) -> Callable[[Post], object]:
    """A fault of the site, by name."""
    return lambda post: getattr(post.site, name)(*words, **more)


def _all(*doings: Callable[[Post], object]) -> Callable[[Post], object]:
    def run(post: Post) -> None:
        for do in doings:
            do(post)

    return run


def _leak(number: int, post: str, title: str, code: str, fault: Callable[[Post], object], **more: Any) -> Row:
    """An address leak: half a second to the verdict."""
    given: dict[str, Any] = {"median": 0.5, "worst": 1.0, "rest": 10.0, "never": frozenset(), "way": by_fault} | more
    return Row(
        number=number, post=post, title=title, state="leaking", codes=frozenset({code}),
        fault=fault, told="leaking", **given,
    )  # fmt: skip


def _names(number: int, post: str, title: str, fault: Callable[[Post], object], **more: Any) -> Row:
    """A DNS leak: two seconds with the leak watch, ten without."""
    never = frozenset({"ip_leak", "ipv6_leak"})
    limits: dict[str, Any] = {"median": 2.0, "worst": 2.0, "without_watch": 10.0, "rest": 10.0} | more
    return Row(
        number=number, post=post, title=title, state="leaking", codes=frozenset({"dns_leak"}), never=never,
        way=by_fault, fault=fault, told="leaking", limit=35, **limits,
    )  # fmt: skip


def _dead(number: int, post: str, title: str, code: str, fault: Callable[[Post], object], **more: Any) -> Row:
    """A dead tunnel: nobody hears of a leak."""
    given: dict[str, Any] = {"codes": frozenset({code}), "never": LEAKS, "way": by_fault, "rest": 10.0} | more
    return Row(number=number, post=post, title=title, state="down", fault=fault, told="down", **given)


def _quiet(number: int, post: str, title: str, fault: Callable[[Post], object] | None = None, **more: Any) -> Row:
    """A healthy tunnel: protected, and nobody hears a thing."""
    given: dict[str, Any] = {"never": ALARMS, "quiet": 12.0, "way": by_watching} | more
    return Row(number=number, post=post, title=title, state="protected", fault=fault, **given)


LEAKS = frozenset({"ip_leak", "ipv6_leak", "dns_leak", "split_route"})
ALARMS = LEAKS | {"no_traffic", "tunnel_down", "dns_down", "country_mismatch", "resolver_unexpected", "high_loss"}
HOLE = {"median": 5.0, "worst": 5.0}


def _exit_is_not_the_endpoint(post: Post) -> str | None:
    assert post.site.endpoint is not None
    same = post.site.endpoint[0] == post.site.exit4
    return "the lab's exit is its endpoint" if same else _exit_is(post)


def _exit_is(post: Post) -> str | None:
    seen = post.now()
    return None if seen.exit4 == post.site.exit4 else f"exit {seen.exit4} and not {post.site.exit4}"


def _exit6_is(post: Post) -> str | None:
    shown = post.now().body["exit"]["ipv6"]
    return None if shown == post.site.exit6 else f"IPv6 exit {shown} and not {post.site.exit6}"


def _sources_disagree(post: Post) -> None:
    """Each service names another country for the address that the exit hops to."""
    address = post.site.line.provider.exits(post.site.line.plan.client)["same"][0]  # type: ignore[union-attr]
    post.lab.service("ipinfo").place(address, country="CH")
    post.lab.service("ipapi").place(address, country="FR")
    post.lab.service("ipwhois").place(address, country="SE")


def _services_fail(post: Post) -> None:
    post.lab.service("ipinfo").fail(429)
    post.lab.service("ipapi").fail(403)
    post.lab.service("ipwhois").fail("garbage")


def _services_heal(way: Way) -> Way:
    def run(row: Row, post: Post) -> Any:
        try:
            return way(row, post)
        finally:
            for name in ("ipinfo", "ipapi", "ipwhois"):
                post.lab.service(name).heal()

    return run


def _fill(post: Post) -> None:
    """A line of 1 Mbit/s, and three downloads that want more."""
    if post.fountain is None:
        post.fountain = traffic.fountain(post.lab.srv)
    post.site.saturate(1000)
    for _ in range(3):
        traffic.download(post.site, post.lab.server4, kbit=4000, seconds=44)


SHUNNED = HOSTS["hooks.test"][0] or ""  # asked by no canary: only a program's own packets show this split


def _program_leaks(post: Post) -> None:
    traffic.call_out(post.site, SHUNNED)


ROWS: tuple[Row, ...] = (
    _quiet(1, "closed", "healthy, kill switch on", kinds=EVERY),
    _quiet(2, "open", "healthy, no kill switch", kinds=EVERY, codes=frozenset({"killswitch_open"})),
    _dead(3, "closed", "tunnel link set down, kill switch", "tunnel_down", _do("link_down")),
    _dead(4, "closed", "tunnel deleted, kill switch", "tunnel_down", _do("delete_tunnel"), kinds=EVERY),
    _leak(5, "open", "tunnel deleted, no kill switch", "ip_leak", _do("delete_tunnel"), kinds=EVERY),
    _dead(6, "hole", "VPN server unreachable, no kill switch", "no_traffic", _do("block_endpoint"),
          codes=frozenset({"no_traffic", "killswitch_open"}), **HOLE),
    _dead(7, "hole", "handshake fresh, nothing forwarded", "no_forwarding", _do("no_forwarding"), **HOLE),
    _dead(8, "holetwo", "key or account revoked", "no_traffic", _do("revoke_peer"), **HOLE),
    _dead(9, "holetwo", "half-open", "no_traffic", _do("half_open"), **HOLE),
    _quiet(10, "idle", "idle, no keepalive, handshake old", kinds=("wireguard",),
           note="the agent's own canaries keep the handshake fresh; an old one is the unit tests' and the soak's"),
    Row(number=11, post="place", title="exit hops within its network", state="protected", way=by_message,
        fault=_do("move_exit"), told="address", never=ALARMS, check=_exit_is),
    Row(number=12, post="place", title="exit hops to a country outside the policy", state="degraded",
        way=by_fault, fault=_do("move_exit", country="other"), told="degraded", never=LEAKS, limit=60,
        codes=frozenset({"country_mismatch"}), note="*degraded* counts after 15 s"),
    Row(number=13, post="doubt", title="sources disagree on the place", state="protected", way=by_message,
        prepare=_sources_disagree, fault=_do("move_exit"), told="address", never=ALARMS, check=_exit_is,
        codes=frozenset({"location_uncertain"})),
    _quiet(14, "closed", "exit is not the endpoint", check=_exit_is_not_the_endpoint),
    _names(15, "names", "resolver reached outside the tunnel", _do("resolver_outside"), kinds=EVERY),
    _names(16, "forward", "LAN forwarder asks the ISP, kill switch", _do("lan_forwarder")),
    _quiet(16, "allowed", "the same, allowed by the policy", _do("lan_forwarder"), part="b", quiet=20.0),
    _quiet(17, "public", "public resolver through the tunnel"),
    _names(18, "names", "public resolver outside the tunnel", _do("public_outside")),
    _quiet(19, "resolver", "the VPN's resolver in another country", _do("resolver_elsewhere"), quiet=15.0),
    _names(20, "names", "two resolvers, one leaks", _do("two_resolvers_one_leaks")),
    _names(21, "names", "transparent DNS proxy at home", _all(_do("transparent_proxy", "home"), _do("public_outside"))),
    _quiet(21, "public", "transparent proxy inside the tunnel", _do("transparent_proxy", "provider"), part="b",
           codes=frozenset({"dns_intercepted"}), limit=30.0),
    Row(number=22, post="resolver", title="resolver down, tunnel fine", state="degraded", way=by_fault,
        fault=_do("stop_resolver"), told="degraded", codes=frozenset({"dns_down"}), limit=60, never=LEAKS,
        note="*degraded* counts after 15 s"),
    _quiet(23, "resolver", "one DNS method blocked", _do("block_name", "whoami.akamai.net"), quiet=15.0),
    _leak(24, "six", "IPv6 outside the tunnel", "ipv6_leak", _do("ipv6_outside"), never=frozenset({"ip_leak"})),
    _quiet(25, "dropped", "IPv6 present but dropped"),
    _quiet(26, "six", "IPv6 inside the tunnel", check=_exit6_is),
    _leak(27, "split", "part of the traffic routed outside", "split_route", _do("split_route"), kinds=EVERY),
    _leak(27, "split", "the same, where only a program's packets go", "split_route", _program_leaks, part="b",
          prepare=_do("split_route", SHUNNED), needs_watch=True, kinds=EVERY),
    Row(number=28, post="gone", title="orphaned namespace", state="silent", way=by_replay, fault=_do("orphan"),
        told="silent", codes=frozenset({"orphaned_namespace"}), limit=25, never=LEAKS,
        note="no way out is left: *silent*, and the replay says *down*"),
    _leak(29, "closed", "start-up window before the kill switch", "ip_leak", _do("delete_tunnel"),
          prepare=_do("set_kill_switch", on=False), way=special.late_kill_switch),
    Row(number=30, post="size", title="MTU black hole", state="degraded", way=by_fault, fault=_do("mtu_black_hole"),
        told="degraded", codes=frozenset({"mtu_blackhole"}), limit=150, never=LEAKS,
        note="looked for every so often; *degraded* counts after 15 s"),
    _quiet(31, "full", "saturated link", _fill, quiet=45.0, never=LEAKS | {"no_traffic"},
           passing=frozenset({"degraded"}), note="*degraded* at most"),
    Row(number=32, post="lossy", title="lossy tunnel, 30 %", state="degraded", way=by_fault, fault=_do("loss", 30),
        told="degraded", codes=frozenset({"high_loss"}), limit=150, never=LEAKS | {"no_traffic"}, quiet=20.0,
        note="a share needs 20 pulses; *degraded* counts after 15 s"),
    _dead(33, "home", "home internet down", "uplink_down", _do("home_internet_down"),
          note="told once for the site, by the reference agent beside the tunnel"),
    _dead(34, "portal", "captive portal", "captive_portal", _do("captive_portal")),
    _quiet(35, "place", "one canary site blocks VPN exits", _do("drop_destination", CLOUDFLARE), quiet=15.0,
           codes=frozenset({"canary_flaky"}), limit=60.0),
    Row(number=36, post="place", title="geolocation services refuse", state="protected",
        way=_services_heal(by_message), prepare=_services_fail, fault=_do("move_exit"), told="address", never=ALARMS,
        check=lambda p: None if p.status()["country"] in ("NL", None) else f"country {p.status()['country']}"),
    Row(number=37, post="given", title="forwarded port changed", state="protected", way=by_message,
        prepare=_next_port, fault=_another_port, told="port", never=ALARMS, limit=45),
    Row(number=38, post="port", title="forwarded port closed", state="degraded", way=by_fault,
        fault=_do("close_port", FORWARDED), told="degraded", codes=frozenset({"port_closed"}), limit=150, never=LEAKS,
        note="tried once a minute; *degraded* counts after 15 s"),
    Row(number=39, post="gone", title="agent killed", state="silent", way=special.agent_killed, told="silent",
        limit=20, never=LEAKS | {"tunnel_down", "no_traffic"}, note="3 intervals of 4 s and one second"),
    Row(number=40, post="away", title="server unreachable, tunnel fine", state="protected", way=special.server_away,
        note="time is from the server's return to the whole replay"),
    Row(number=41, post="away", title="server killed and started", state="protected", way=special.server_killed,
        note="time is that of the restart"),
    Row(number=42, post="flap", title="flapping tunnel", state="degraded", way=special.flapping, limit=180,
        note="down 5 s, up some seconds, again and again"),
    _leak(43, "moving", "home address changes, then a leak", "ip_leak", _do("delete_tunnel"), way=special.home_moves,
          median=None, worst=None, note="a reference agent tells the new address; then row 5"),
    _dead(44, "gluetun", "gluetun says running, tunnel dead", "no_forwarding", _do("no_forwarding")),
    _dead(45, "closed", "client killed, kill switch", "tunnel_down", _do("kill_openvpn"), kinds=_KILLED),
    _leak(45, "open", "client killed, no kill switch", "ip_leak", _do("kill_openvpn"), part="b",
          kinds=tuple(kind for kind in _KILLED if kind != "openconnect")),
    Row(number=46, post="away", title="wrong clock on the agent", state="protected", way=special.wrong_clock, limit=20,
        codes=frozenset({"clock_skew"}), quiet=9.0, note="wall clock 600 s ahead"),
    *field.ROWS,
)  # fmt: skip
