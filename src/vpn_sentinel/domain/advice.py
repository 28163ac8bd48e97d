"""What to do about a finding, by its facts where its code alone is not enough.

Facts are text to text, as a finding keeps them, so that findings that an older version stored get advice as well.
"""

from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.domain.policy import IPAddress, is_public

Facts = Mapping[str, str]

_USE_VPN_DNS: Final = "name the VPN's own nameserver (in resolv.conf, or as Docker's dns)"
_ALLOW: Final = "If it is meant to be asked, put it into VPN_SENTINEL_ALLOWED_RESOLVERS."
_MEANT: Final = "If it is meant to go there, say so in VPN_SENTINEL_ALLOWED_OUTSIDE or VPN_SENTINEL_MEANT_OUTSIDE."
_BRING_TUNNEL_UP: Final = "Stop the programs behind this tunnel, bring it back up, and switch its kill switch on."


def advice(code: str, facts: Facts) -> str | None:
    """What to do, None where the general advice of the code fits."""
    by_cause = _BY_CODE.get(code)
    return by_cause(facts) if by_cause else None


def _ip_leak(facts: Facts) -> str | None:
    match facts.get("tunnel"):
        case "up":
            return (
                "Stop the programs behind this tunnel. It is up, and traffic does not take it: see which route or rule "
                "sends it elsewhere (ip rule; ip route show table all), and switch the kill switch on."
            )
        case "down" | "gone":
            return _BRING_TUNNEL_UP
        case _:
            return None


def _ipv6_leak(facts: Facts) -> str | None:
    return _BRING_TUNNEL_UP if facts.get("tunnel") in ("down", "gone") else None


def _dns_leak(facts: Facts) -> str | None:
    rule = facts.get("by_rule") or facts.get("traffic")
    if rule:
        by = f" by {facts['interface']}" if facts.get("interface") and "by_rule" not in facts else ""
        return (
            f"Remove the rule (ip rule) that sends {rule}{by}, past the tunnel: names go there, whichever resolver is "
            f"asked. {_MEANT}"
        )
    server = _address(facts.get("nameserver"))
    if server is None:
        return _dns_without_a_nameserver(facts)
    if facts.get("client_subnet"):
        return (
            f"What asks {server} does so from home, or names home's network in its questions (EDNS client subnet): "
            f"route {server} through the tunnel, switch client subnets off in a forwarder, or {_USE_VPN_DNS}. {_ALLOW}"
        )
    if server.is_loopback:
        return (
            f"The forwarder on this host, {server}, asks at home, or from there: set its upstream to the VPN's "
            f"nameserver (Docker's 127.0.0.11 takes it from dns of the container). {_ALLOW}"
        )
    if not is_public(server) and facts.get("path") != "tunnel":
        return (
            f"The router or forwarder at {server} passes names on outside the VPN: {_USE_VPN_DNS}, and let the kill "
            f"switch close port 53 to the local network. {_ALLOW}"
        )
    if facts.get("path") == "outside" or facts.get("asked_from"):
        return f"Route {server} through the tunnel, or {_USE_VPN_DNS}. {_ALLOW}"
    at = "the home provider's resolver" if facts.get("asn") else "a resolver at home"
    return f"What the nameserver {server} is asked goes on to {at}: {_USE_VPN_DNS}. {_ALLOW}"


def _dns_without_a_nameserver(facts: Facts) -> str | None:
    if "getaddrinfo" in facts.get("seen_by", "") or facts.get("method") == "system":
        return _by_system()
    return _by_packet(facts)


def _by_system() -> str:
    return (
        "Programs use another resolver than resolv.conf names: see the line `hosts:` of /etc/nsswitch.conf and what "
        f"`resolvectl status` shows, and {_USE_VPN_DNS}. {_ALLOW}"
    )


def _by_packet(facts: Facts) -> str | None:
    destination = facts.get("destination")
    if not destination:
        return None
    if destination.endswith(":853"):
        return (
            f"A program asks {destination} by DNS over TLS or QUIC, whatever resolv.conf says: set its own resolver, "
            f"or route that address through the tunnel. {_ALLOW}"
        )
    at = destination.rpartition(":")[0]
    if facts.get("routed_by"):
        return f"{_left_despite_routes(facts, at)} {_ALLOW}"
    return (
        f"Route {at} through the tunnel, or {_USE_VPN_DNS}. Where nothing here names {at}, a firewall rule here "
        f"leads names there (nft list ruleset; iptables-save): remove it. {_ALLOW}"
    )


def _left_despite_routes(facts: Facts, destination: str) -> str:
    """For a packet that left outside the tunnel although the routes are right."""
    by = facts.get("interface") or "another device"
    return (
        f"Routes send {destination} through {facts['routed_by']}, and it left by {by} all the same: see which program "
        f"sends it ({_sender_commands(facts)}) and is bound to {by} or its address, whether a firewall here marks or "
        "redirects it (nft list ruleset; iptables-save), or a rule is for some users alone (ip rule)."
    )


def _sender_commands(facts: Facts) -> str:
    """The commands that show the sender: ss -tu for TCP and UDP, ss -w for raw sockets, a capture for the rest."""
    if facts.get("protocol", "udp") in ("udp", "tcp"):
        return "ss -tunp"
    device, host = facts.get("interface") or "any", facts.get("destination", "")
    return f"ss -wnp; tcpdump -ni {device} host {host}"


def _split_route(facts: Facts) -> str | None:
    by = f" by {facts['interface']}" if facts.get("interface") else ""
    match facts.get("seen_by"):
        case "routing tables" if facts.get("also_by"):
            return (
                f"Take {facts.get('interface', 'the way beside the tunnel')} out of the routes that share traffic with "
                f"{facts['also_by']} (nexthop in ip route), or remove the rule that selects it by source. {_MEANT}"
            )
        case "routing tables" if facts.get("traffic"):
            return f"Remove the rule (ip rule) that sends {facts['traffic']} past the tunnel{by}. {_MEANT}"
        case "routing tables":
            return f"Remove what leads past the tunnel{by}: see `ip rule` and `ip route show table all`. {_MEANT}"
        case "leak watch" if facts.get("destination") and facts.get("routed_by"):
            return f"{_left_despite_routes(facts, facts['destination'])} {_MEANT}"
        case "leak watch" if facts.get("destination"):
            return (
                f"See which program sends to {facts['destination']} ({_sender_commands(facts)}) and why it leaves"
                f"{by or ' there'}: a route, a rule, or a program that is bound to the interface. {_MEANT}"
            )
        case _:
            return None


def _flapping(facts: Facts) -> str | None:
    match facts.get("verdict"):
        case "down":
            return "See in the tunnel's log and at the home connection which of them comes and goes."
        case "leaking":
            return (
                "Traffic beside the tunnel comes and goes: the leak's finding shows which; see what starts at those "
                "times, such as a program, or a script that sets routes."
            )
        case "degraded":
            return "The tunnel works, and another finding comes and goes: follow its advice."
        case _:
            return None


def _mtu_blackhole(facts: Facts) -> str | None:
    passes = facts.get("passes")
    return f"Lower the MTU of the tunnel's interface to {passes}, which passes." if passes else None


def _leak_watch_off(facts: Facts) -> str | None:
    if facts.get("packet_socket", "opens") == "opens":
        return None
    return (
        "Give the agent CAP_NET_RAW (in a container, cap_add: NET_RAW), or allow AF_PACKET in its sandbox, and it sees "
        "each packet that leaves outside the tunnel."
    )


def _no_network(facts: Facts) -> str | None:
    if facts.get("interfaces") == "lo":
        return (
            "Attach this container or namespace to a network. Where it shared another container's (network_mode) and "
            "that one was restarted, recreate it: a restart will not bring the network back."
        )
    if facts.get("refused"):
        return "See which rule of the firewall here refuses it (nft list ruleset; iptables-save), and let it pass."
    return None


def _nothing_seen(facts: Facts) -> str | None:
    if facts.get("user"):
        return f"Run the agent as user {facts['user']}, or give it CAP_SETUID, as root has."
    if facts.get("path") == "tunnel":
        return (
            "Run the reference agent outside the tunnel's network, on the host say; or watch this tunnel with "
            "VPN_SENTINEL_ROLE=tunnel."
        )
    if "blocked" in facts.values():
        return "A firewall here refuses what the agent sends (nft list ruleset; iptables-save): let it pass."
    if facts.get("reason"):
        return "Fix what keeps the agent from probing; its log says more."
    return None


def _tunnel_unknown(facts: Facts) -> str | None:
    if facts.get("beside"):
        return (
            "See whether a firewall's mark and a rule for it lead traffic past the tunnel (nft list ruleset; "
            f"iptables-save; ip rule). If {facts['beside']} is your own line's address, put it into "
            "VPN_SENTINEL_HOME_NETWORKS."
        )
    if facts.get("declared") and facts.get("exit"):
        return (
            f"None of the home networks ({facts['declared']}) can be compared with {facts['exit']}: add your line's "
            "public address of that IP version (--home, VPN_SENTINEL_HOME_NETWORKS)."
        )
    if facts.get("declared"):
        return "No answer showed from which address traffic leaves: there is nothing to compare with the home networks."
    if not facts.get("home"):
        return None
    return (
        f"See whether {facts.get('exit', 'this address')} is your own line's now, and put it into "
        "VPN_SENTINEL_HOME_NETWORKS if it is; or run the agent where the tunnel's interface is."
    )


def _tunnel_unseen(facts: Facts) -> str | None:
    if not facts.get("interface"):
        return None
    return (
        "Name the VPN's own device in VPN_SENTINEL_TUNNEL_INTERFACE, or leave that out, and it is found. Where the VPN "
        "ends on another machine, set VPN_SENTINEL_HOME_NETWORKS: they distinguish your own line from the VPN's."
    )


def _killswitch_open(facts: Facts) -> str | None:
    open_interfaces, blocked = facts.get("interfaces"), facts.get("held")
    if not open_interfaces:
        return None
    if blocked:
        return f"The kill switch holds {blocked} and not {open_interfaces}: extend it to {open_interfaces}."
    on = f"Switch the VPN's kill switch on: without one, traffic leaks by {open_interfaces} when the tunnel goes away."
    router = facts.get("router")
    return on if not router else f"{on} If {router} is yours and lets nothing but the VPN pass, nothing need be done."


def _address(text: str | None) -> IPAddress | None:
    try:
        return ip_address(text) if text else None
    except ValueError:
        return None


def _no_traffic(facts: Facts) -> str | None:
    if "refused" not in facts:
        return None
    return (
        "See this host's firewall (nft list ruleset; iptables-save): it refuses what goes into the tunnel. A kill "
        "switch may let another device or user pass, and not these."
    )


def _no_reports(facts: Facts) -> str | None:
    if "heard" not in facts:
        return None
    return "See the agent's log: something between it and this server holds connections (TCP) back, or answers them."


_BY_CODE: Final[Mapping[str, Callable[[Facts], str | None]]] = {
    "ip_leak": _ip_leak,
    "ipv6_leak": _ipv6_leak,
    "dns_leak": _dns_leak,
    "split_route": _split_route,
    "killswitch_open": _killswitch_open,
    "flapping": _flapping,
    "leak_watch_off": _leak_watch_off,
    "mtu_blackhole": _mtu_blackhole,
    "no_network": _no_network,
    "nothing_seen": _nothing_seen,
    "tunnel_unknown": _tunnel_unknown,
    "tunnel_unseen": _tunnel_unseen,
    "no_reports": _no_reports,
    "no_traffic": _no_traffic,
}
