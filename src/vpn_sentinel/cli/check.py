"""`vpn-sentinel check`: one round on this machine, judged here; the exit status is the verdict."""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from vpn_sentinel.cli.settings import add_config, source_of, warn_unknown
from vpn_sentinel.cli.terminal import of_stdout
from vpn_sentinel.domain.judge import agreed_country, packets_unseen
from vpn_sentinel.domain.observation import Answer, Canary, Observation, Place, Probe
from vpn_sentinel.domain.policy import IPAddress, Policy
from vpn_sentinel.domain.routes import all_described
from vpn_sentinel.domain.verdict import Severity, State, Verdict
from vpn_sentinel.runtime import logs
from vpn_sentinel.runtime import parsers as read
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.settings import SettingError, from_toml

if TYPE_CHECKING:
    from vpn_sentinel.agent.once import CheckResult

T = TypeVar("T")
USAGE: Final = 64  # EX_USAGE of sysexits(3)
STATUS: Final = {State.PROTECTED: 0, State.DEGRADED: 1, State.LEAKING: 2, State.DOWN: 3, State.UNKNOWN: 4}
_LEAK_WATCH_TEXT: Final = {
    True: "on",
    False: "off, or not on every interface: see below",
    None: "off: switched off, or the tunnel's own packets cannot be distinguished",
}
_COLOURS: Final = {
    State.PROTECTED: "green",
    State.DEGRADED: "yellow",
    State.LEAKING: "bold red",
    State.DOWN: "red",
    State.UNKNOWN: "magenta",
}
# The mark, its ASCII replacement where the output's encoding lacks it, and its style.
_MARKS: Final = {
    Severity.CRITICAL: ("✗", "x", "red"),
    Severity.WARNING: ("!", "!", "yellow"),
    Severity.INFO: ("·", "-", "dim"),
}


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="check this machine once, without a server",
        epilog="Exit status: 0 protected, 1 degraded, 2 leaking, 3 down, 4 unknown, 64 wrong usage.",
    )
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--policy",
        metavar="FILE",
        help="TOML with home_networks, expected_countries, allowed_resolvers, allowed_outside",
    )
    parser.add_argument("--home", metavar="CIDR", action="append", help="the home's public addresses; may be repeated")
    parser.add_argument(
        "--country", metavar="CC", action="append", help="a country where the exit may be; may be repeated"
    )
    parser.add_argument(
        "--server", metavar="URL", help="a VPN Sentinel server that returns this machine's exit address"
    )
    parser.add_argument(
        "--interface", dest="TUNNEL_INTERFACE", metavar="NAME", help="the tunnel's interface (default: found)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from vpn_sentinel.agent.once import check_once
    from vpn_sentinel.agent.settings import ProbeSettings

    try:
        source = source_of(args)
        settings = ProbeSettings.read(source)
        policy = _policy(settings.policy, args)
        server = _flag("--server", read.url, args.server) if args.server else None
        warn_unknown(source, "check")
        logs.open_log(quiet=True)
        result = asyncio.run(check_once(settings, policy, SystemClock(), server=server))
    except SettingError as e:
        print(f"vpn-sentinel: {e}", file=sys.stderr)
        return USAGE
    if args.json:
        print(json.dumps(as_json(result.seen, result.verdict)))
    else:
        show(result)
    return STATUS[result.verdict.state]


# --- input ---


def _policy(base: Policy, args: argparse.Namespace) -> Policy:
    """The policy of the settings, with the additions of file and flags. Raises SettingError."""
    values = _policy_file(args.policy) if args.policy else {}
    lists = {
        "home_networks": _flag("--home", read.home_networks, ",".join(args.home or ())),
        "expected_countries": _flag("--country", read.countries, ",".join(args.country or ())),
    }
    in_file = {
        "home_networks": _flag("home_networks", read.home_networks, values.get("home_networks", "")),
        "expected_countries": _flag("expected_countries", read.countries, values.get("expected_countries", "")),
        "allowed_resolvers": _flag("allowed_resolvers", read.networks, values.get("allowed_resolvers", "")),
        "allowed_outside": _flag("allowed_outside", read.networks, values.get("allowed_outside", "")),
    }
    both: dict[str, Any] = {
        name: tuple(dict.fromkeys((*getattr(base, name), *more, *lists.get(name, ()))))
        for name, more in in_file.items()
    }
    return replace(base, **both)


def _policy_file(path: str) -> dict[str, str]:
    values = from_toml(path, f"--policy {path}")
    allowed = {"home_networks", "expected_countries", "allowed_resolvers", "allowed_outside"}
    if unknown := sorted(values.keys() - allowed):
        raise SettingError(f"--policy {path}", f"{unknown[0]!r} is not one of {', '.join(sorted(allowed))}")
    found = {}
    for name, value in values.items():
        items: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise SettingError(f"--policy {path}", f"{name} takes a list of texts")
        found[name] = ",".join(items)
    return found


def _flag(name: str, parse: Callable[[str], T], value: str) -> T:
    try:
        return parse(value)
    except ValueError as e:
        raise SettingError(name, str(e)) from e


# --- output ---


def as_json(seen: Observation, verdict: Verdict) -> dict[str, Any]:
    """The object that `--json` prints; its form is a documented contract."""
    link = seen.link
    return {
        "state": verdict.state.value,
        "findings": [
            {"code": f.code.value, "severity": f.severity.value, "message": f.message, "evidence": dict(f.evidence)}
            for f in verdict.findings
        ],
        "exit": _exit(seen),
        "resolvers": [
            {"ip": str(egress), "country": agreed_country(places), "org": _first(places, "org")}
            for egress in _egresses(seen)
            for places in (seen.places_of(egress),)
        ],
        "tunnel": {
            "interface": link.name if link else None,
            "present": link.present if link else False,
            "up": link.up if link else False,
            "received_bytes": link.rx_bytes if link else 0,
            "sent_bytes": link.tx_bytes if link else 0,
        },
        "uplinks": list(seen.uplinks or ()),
        "routes": [
            {
                "interface": r.interface,
                "family": r.family,
                "share": round(r.share, 6),
                "networks": [str(n) for n in r.networks],
                "more": r.more,
                "traffic": r.only,
            }
            for r in seen.routed or ()
        ],
        "system_lookup": {"answer": seen.system_lookup.answer.value, "error": seen.system_lookup.error}
        if seen.system_lookup
        else None,
        "leak_watch": seen.leak_watch,
        "escapes": [
            {
                "interface": e.interface,
                "protocol": e.protocol,
                "source": str(e.source),
                "source_port": e.source_port,
                "destination": str(e.destination),
                "destination_port": e.destination_port,
                "packets": e.packets,
                "bytes": e.size,
                "name": e.name,
            }
            for e in seen.escapes
        ],
        "took_ms": round(seen.took_ms),
    }


def _exit(seen: Observation) -> dict[str, Any]:
    places = seen.places_of(seen.exit(4)) or seen.places_of(seen.exit(6))
    country = agreed_country(places)
    # City and region come from sources that name the agreed country.
    trusted = tuple(p for p in places if p.country in (country, None)) if country else ()
    return {
        "ipv4": str(seen.exit(4)) if seen.exit(4) else None,
        "ipv6": str(seen.exit(6)) if seen.exit(6) else None,
        "country": country,
        "city": _first(trusted, "city"),
        "region": _first(trusted, "region"),
        "asn": _first(places, "asn"),
        "org": _first(places, "org"),
        "timezone": _first(trusted, "timezone"),
    }


def _first(places: Sequence[Place], name: str) -> Any:
    return next((value for p in places if (value := getattr(p, name)) is not None), None)


def _egresses(seen: Observation) -> list[IPAddress]:
    used = seen.system_lookup.egress if seen.system_lookup else ()
    return list(dict.fromkeys((*(s.egress for s in seen.resolvers if s.egress), *used)))


def unseen(result: "CheckResult") -> list[str]:
    """What could not be checked, and why, so that nobody takes a missing finding for a good result."""
    seen, survey = result.seen, result.survey
    found = []
    if seen.interfaces is None:
        found.append("Interfaces and routes: the kernel's netlink is not available here.")
    if seen.link is not None:
        beside = [c for c in seen.canaries if c.probe is Probe.PHYSICAL]
        if survey.physical is None:
            found.append("The kill switch: no other network interface is in use here.")
        elif all(c.answer is Answer.UNKNOWN for c in beside):
            uplinks = ", ".join(i.name for i in survey.uplinks)
            found.append(
                f"The kill switch: nothing could be asked by {uplinks}: there is no route, or it is not permitted."
            )
    if seen.leak_watch is False:
        found.append(packets_unseen(seen.watch_refused))
    if not seen.resolvers:
        urgent = result.verdict.state in (State.LEAKING, State.DOWN)
        why = "not asked, as the traffic itself already shows the trouble" if urgent else "/etc/resolv.conf names none"
        if seen.refused_user is not None:
            why = f"not asked, as that is not permitted in the place of user {seen.refused_user}"
        found.append(f"Nameservers: {why}.")
    exit_ = seen.exit(4) or seen.exit(6)
    if exit_ is not None and not seen.places_of(exit_):
        found.append(f"The place of {exit_}: no geolocation service answered.")
    return found


def show(result: "CheckResult") -> None:
    """Print for people."""
    terminal = of_stdout()
    seen, verdict = result.seen, result.verdict
    arrow = terminal.printable_or("→", "->")
    terminal.line(verdict.state.upper(), _COLOURS[verdict.state])
    terminal.table(_facts(seen))
    for finding in verdict.findings:
        mark, plain, style = _MARKS[finding.severity]
        lead = f"{terminal.printable_or(mark, plain)} {finding.code.value}"
        terminal.line(finding.message, lead=((lead, style), ("  ", "")), indent=4)
        for key, value in finding.evidence.items():
            terminal.line(f"{key}: {value}", "dim", lead=(("    ", ""),), indent=6)
        terminal.command(f"{arrow} {finding.advice}", indent=4)
    if missing := unseen(result):
        terminal.line("Not looked at:", "dim")
        for line in missing:
            terminal.line(line, "dim", lead=(("  ", ""),), indent=4)


def _facts(seen: Observation) -> list[tuple[str, str]]:
    exit_ = _exit(seen)
    where = ", ".join(str(v) for v in (exit_["city"], exit_["region"], exit_["country"]) if v)
    network = " ".join(str(v) for v in (f"AS{exit_['asn']}" if exit_["asn"] else None, exit_["org"]) if v)
    rows = [("exit", " and ".join(a for a in (exit_["ipv4"], exit_["ipv6"]) if a) or "none seen")]
    rows += [(name, value) for name, value in (("place", where), ("network", network)) if value]
    if seen.link is not None:
        state = "up" if seen.link.up else "down" if seen.link.present else "gone"
        rows.append(("tunnel", f"{seen.link.name}, {state}"))
    else:
        rows.append(("tunnel", "nothing shows that a VPN carries the traffic"))
    if seen.uplinks:
        rows.append(("beside it", ", ".join(seen.uplinks)))
    rows += [("routes", words) for words in all_described(seen.routed or (), seen.link.name if seen.link else None)]
    for egress in _egresses(seen):
        org = _first(seen.places_of(egress), "org")
        rows.append(("resolver", f"{egress}{f' ({org})' if org else ''}"))
    if (lookup := seen.system_lookup) is not None:
        rows.append(("names", f"getaddrinfo: {lookup.answer}{f' ({lookup.error})' if lookup.error else ''}"))
    if seen.link is not None:
        rows.append(("leak watch", _LEAK_WATCH_TEXT[seen.leak_watch]))
    rows.append(("asked", ", ".join(_asked(c) for c in seen.asked(Probe.DEFAULT)) or "nobody"))
    rows.append(("took", f"{seen.took_ms / 1000:.1f} s"))
    return rows


def _asked(canary: Canary) -> str:
    lookup = canary.answer if canary.address or canary.answer is not Answer.ANSWERED else "answered, without an address"
    return f"{canary.target} over IPv{canary.family}: {lookup}"
