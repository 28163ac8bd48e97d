"""The vocabulary of verdicts: states, finding codes, and what each code means and advises.

`domain.judge` makes findings; code that shows or stores a verdict needs only this module.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from vpn_sentinel.domain.advice import advice


class State(StrEnum):
    """The state of a verdict or of a tunnel.

    `silent`, `unverified` and `pending` are never a verdict's; `unknown` is never a tunnel's: where it lasts, the
    tunnel is `unverified`.
    """

    LEAKING = "leaking"
    DOWN = "down"
    DEGRADED = "degraded"
    SILENT = "silent"
    UNVERIFIED = "unverified"
    PENDING = "pending"
    UNKNOWN = "unknown"
    PROTECTED = "protected"


# Worst first.
HARM: Final = tuple(State)


class Severity(StrEnum):
    CRITICAL = "critical"
    WARNING = "warning"
    INFO = "info"


class Code(StrEnum):
    IP_LEAK = "ip_leak"
    IPV6_LEAK = "ipv6_leak"
    DNS_LEAK = "dns_leak"
    SPLIT_ROUTE = "split_route"
    TUNNEL_DOWN = "tunnel_down"
    NO_TRAFFIC = "no_traffic"
    NO_FORWARDING = "no_forwarding"
    CAPTIVE_PORTAL = "captive_portal"
    UPLINK_DOWN = "uplink_down"
    ORPHANED_NAMESPACE = "orphaned_namespace"
    COUNTRY_MISMATCH = "country_mismatch"
    DNS_DOWN = "dns_down"
    MTU_BLACKHOLE = "mtu_blackhole"
    HIGH_LOSS = "high_loss"
    HIGH_LATENCY = "high_latency"
    PORT_CLOSED = "port_closed"
    FLAPPING = "flapping"
    NAME_SHARED = "name_shared"
    NOTHING_SEEN = "nothing_seen"
    NO_NETWORK = "no_network"
    TUNNEL_UNKNOWN = "tunnel_unknown"
    NO_REPORTS = "no_reports"
    TUNNEL_UNSEEN = "tunnel_unseen"
    KILLSWITCH_OPEN = "killswitch_open"
    CONTAINED = "contained"
    DNS_INTERCEPTED = "dns_intercepted"
    DNS_REWRITTEN = "dns_rewritten"
    RESOLVER_UNEXPECTED = "resolver_unexpected"
    RESOLVER_UNKNOWN = "resolver_unknown"
    LOCATION_UNCERTAIN = "location_uncertain"
    CANARY_FLAKY = "canary_flaky"
    LEAK_WATCH_OFF = "leak_watch_off"
    PULSES_BLOCKED = "pulses_blocked"
    CLOCK_SKEW = "clock_skew"
    OBSERVATIONS_LOST = "observations_lost"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a code means for the tunnel's state, its severity, and the advice where the facts allow no better one."""

    state: State
    severity: Severity
    advice: str


_CRITICAL, _WARNING, _INFO = Severity.CRITICAL, Severity.WARNING, Severity.INFO
MEANING: Final[Mapping[Code, Meaning]] = {
    Code.IP_LEAK: Meaning(
        State.LEAKING,
        _CRITICAL,
        "Stop the programs behind this tunnel, bring it back up, and switch its kill switch on.",
    ),
    Code.IPV6_LEAK: Meaning(State.LEAKING, _CRITICAL, "Route IPv6 through the tunnel, or block it outside the tunnel."),
    Code.DNS_LEAK: Meaning(
        State.LEAKING,
        _CRITICAL,
        "Name the VPN's own nameserver (in resolv.conf, or as Docker's dns), or allow the resolver if it is meant.",
    ),
    Code.SPLIT_ROUTE: Meaning(
        State.LEAKING, _CRITICAL, "Look for routes and rules that send some destinations past the tunnel."
    ),
    Code.TUNNEL_DOWN: Meaning(State.DOWN, _CRITICAL, "Bring the tunnel's interface back up."),
    Code.NO_TRAFFIC: Meaning(
        State.DOWN, _CRITICAL, "Reconnect the tunnel or choose another VPN server; the interface alone says nothing."
    ),
    Code.NO_FORWARDING: Meaning(
        State.DOWN, _CRITICAL, "The VPN server answers and forwards nothing: choose another one, or tell its operator."
    ),
    Code.CAPTIVE_PORTAL: Meaning(
        State.DOWN, _CRITICAL, "Open a web page on this network and log in there; until then no tunnel can come up."
    ),
    Code.UPLINK_DOWN: Meaning(
        State.DOWN,
        _CRITICAL,
        "Look at the home connection first, and at a firewall here that drops answers: it is not the VPN's fault.",
    ),
    Code.ORPHANED_NAMESPACE: Meaning(
        State.DOWN, _CRITICAL, "Recreate this container; a restart will not bring its network back."
    ),
    Code.COUNTRY_MISMATCH: Meaning(
        State.DEGRADED, _WARNING, "Choose a VPN server in an expected country, or add this country to the policy."
    ),
    Code.DNS_DOWN: Meaning(
        State.DEGRADED,
        _WARNING,
        "Answers come from the internet, but names are not found, or late: check /etc/resolv.conf and its nameservers.",
    ),
    Code.MTU_BLACKHOLE: Meaning(
        State.DEGRADED,
        _WARNING,
        "Lower the MTU of the tunnel's interface until large packets pass; 1280 does nearly everywhere.",
    ),
    Code.HIGH_LOSS: Meaning(State.DEGRADED, _WARNING, "Look at the home connection, or choose another VPN server."),
    Code.HIGH_LATENCY: Meaning(
        State.DEGRADED, _WARNING, "The line is full or the VPN server is: wait, limit what fills it, or choose another."
    ),
    Code.PORT_CLOSED: Meaning(
        State.DEGRADED, _WARNING, "Ask the VPN for a new forwarded port, and see that it is the one in use."
    ),
    Code.FLAPPING: Meaning(
        State.DEGRADED, _WARNING, "See in the other findings and in the tunnel's log what comes and goes."
    ),
    Code.NAME_SHARED: Meaning(State.DEGRADED, _WARNING, "Give each agent a VPN_SENTINEL_CLIENT_ID of its own."),
    Code.NOTHING_SEEN: Meaning(State.UNKNOWN, _WARNING, "No canary could be sent; look at the agent's log."),
    Code.NO_NETWORK: Meaning(
        State.UNKNOWN,
        _WARNING,
        "No answer came: see that there is a default route, and that no firewall here refuses what is sent (UDP) or "
        "drops what comes back (INPUT).",
    ),
    Code.TUNNEL_UNKNOWN: Meaning(
        State.UNKNOWN,
        _WARNING,
        "No tunnel interface is known here and no home network is declared: set VPN_SENTINEL_HOME_NETWORKS.",
    ),
    Code.NO_REPORTS: Meaning(State.SILENT, _CRITICAL, "Look whether the agent runs and whether its tunnel is down."),
    Code.TUNNEL_UNSEEN: Meaning(
        State.PROTECTED,
        _INFO,
        "Keep the declared home addresses true (VPN_SENTINEL_HOME_NETWORKS), or run the agent where the tunnel is.",
    ),
    Code.KILLSWITCH_OPEN: Meaning(
        State.PROTECTED,
        _WARNING,
        "Switch the VPN's kill switch on: without one, traffic leaks when the tunnel goes away.",
    ),
    Code.CONTAINED: Meaning(
        State.PROTECTED,
        _WARNING,
        "The agent has closed this namespace; it opens again when the tunnel is proven, or by vpn-sentinel release.",
    ),
    Code.DNS_REWRITTEN: Meaning(
        State.PROTECTED, _WARNING, "A resolver gives names that do not exist an address of its own: use another one."
    ),
    Code.DNS_INTERCEPTED: Meaning(
        State.PROTECTED,
        _WARNING,
        "Somebody answers DNS queries in another's place: a redirect in this host's own firewall (nft list ruleset; "
        "iptables-save), a router, or the VPN. If that is not meant, remove it, or ask by DNS over TLS or HTTPS.",
    ),
    Code.RESOLVER_UNEXPECTED: Meaning(
        State.PROTECTED, _WARNING, "Check that you know this resolver; if you do, allow it in the policy."
    ),
    Code.RESOLVER_UNKNOWN: Meaning(
        State.PROTECTED,
        _INFO,
        "Delegate a DNS zone to the server (docs/how-to/dns-canary.md): it sees who asks for it.",
    ),
    Code.LOCATION_UNCERTAIN: Meaning(
        State.PROTECTED, _INFO, "Nothing to do: databases often disagree on VPN exits; see the evidence."
    ),
    Code.CANARY_FLAKY: Meaning(State.PROTECTED, _INFO, "Nothing to do: the other canaries answer."),
    Code.LEAK_WATCH_OFF: Meaning(
        State.PROTECTED,
        _INFO,
        "See in the agent's log why, and mend that: then the agent sees each packet that leaves outside the tunnel.",
    ),
    Code.PULSES_BLOCKED: Meaning(
        State.PROTECTED, _INFO, "Let UDP to the server's API port pass; until then reports alone are the sign of life."
    ),
    Code.CLOCK_SKEW: Meaning(State.PROTECTED, _WARNING, "Set the agent's clock."),
    Code.OBSERVATIONS_LOST: Meaning(
        State.PROTECTED,
        _INFO,
        "See in the agent's log whether it had no room or its disk lost them, and give VPN_SENTINEL_DATA_DIR room or "
        "a sound disk. The tunnel's present state is known all the same.",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found, in words (`message`) and facts (`evidence`, text to text)."""

    code: Code
    message: str
    evidence: Mapping[str, str] = field(default_factory=dict)

    @property
    def severity(self) -> Severity:
        return MEANING[self.code].severity

    @property
    def advice(self) -> str:
        return advice(self.code, self.evidence) or MEANING[self.code].advice


@dataclass(frozen=True, slots=True)
class Verdict:
    state: State
    findings: tuple[Finding, ...] = ()


def worst(findings: tuple[Finding, ...]) -> State:
    """The state of the most harmful finding; protected without any.

    *Degraded* means that a tunnel works, with trouble. Where it is unknown whether it works, it cannot be *degraded*.
    """
    states = {MEANING[f.code].state for f in findings}
    if State.UNKNOWN in states:
        states.discard(State.DEGRADED)
    return min(states, key=HARM.index, default=State.PROTECTED)
