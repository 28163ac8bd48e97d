"""Checks of our own server: whether it is reachable and accepts the key; its UDP port and its DNS zone."""

import asyncio
from collections.abc import Sequence
from typing import Final

from vpn_sentinel.agent.doctor.check import Check, gap, ok, unknown
from vpn_sentinel.agent.doctor.context import DoctorContext, Greeting
from vpn_sentinel.agent.net.http import connected
from vpn_sentinel.agent.net.urls import split
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.agent.probes.datagram import DatagramTarget, ask
from vpn_sentinel.agent.probes.targets import ServerEcho
from vpn_sentinel.domain.observation import Answer
from vpn_sentinel.domain.policy import IPAddress

_GET_KEY: Final = "the token of `vpn-sentinel token create NAME` on the server, as VPN_SENTINEL_API_KEY"
_CONNECT_TIMEOUT_S: Final = 2.0
_NO_REPORTS: Final = "reports wait in the spool; people are only notified that this agent is silent."


async def server(context: DoctorContext) -> list[Check]:
    greetings = await context.greetings.result()
    if not greetings:
        fix = f"set VPN_SENTINEL_URL to the server's address, and {_GET_KEY}"
        return [gap("server", "none is configured", "nobody is notified of what is seen here.", fix)]
    has_key = bool(context.settings.agent.api_key)
    return [
        about_server("server" if n == 0 else f"server {n + 1}", g, has_key=has_key) for n, g in enumerate(greetings)
    ]


def about_server(name: str, greeting: Greeting, *, has_key: bool) -> Check:
    url, status = greeting.url, greeting.status
    match status:
        case None:
            return gap(name, f"{url}: {greeting.why}", _NO_REPORTS, _fix_for(greeting.why))
        case 200 if greeting.welcome is not None:
            return ok(name, f"{url} is reached and accepts the key")
        case _ if not greeting.ours:
            fix = "check what is in between (a proxy, a login page, a firewall), and VPN_SENTINEL_URL"
            return gap(
                name, f"{url}: something on the way answers in the server's place (HTTP {status})", _NO_REPORTS, fix
            )
        case 401 | 403 if not has_key:
            return gap(name, f"{url} is reached; no key is configured", _NO_REPORTS, _GET_KEY)
        case 401 | 403:
            fix = "make a new token on the server for this name, or see its VPN_SENTINEL_SERVER_ALLOWED_IPS"
            return gap(name, f"{url} is reached and refuses the key (HTTP {status})", _NO_REPORTS, fix)
        case 429:
            return unknown(name, f"{url} is reached and asks us to wait (HTTP 429)", fix="try again in a minute")
        case 503:
            return gap(
                name, f"{url} is reached and cannot store (HTTP 503)", _NO_REPORTS, "see the server's log: its database"
            )
        case _:
            fix = "see VPN_SENTINEL_URL and VPN_SENTINEL_API_PATH, and the server's version"
            return gap(name, f"{url} does not answer as our server does (HTTP {status})", _NO_REPORTS, fix)


def _fix_for(why: str) -> str:
    if "certificate" in why or "TLS" in why:
        return "see the server's certificate; VPN_SENTINEL_CA_FILE names a CA of your own"
    if "address found" in why:
        return "see the name in VPN_SENTINEL_URL; an IP address there needs no DNS"
    return "check that the server runs, and that the VPN and its firewall let this connection pass"


async def addresses(context: DoctorContext) -> list[Check]:
    """A server name with an address that nobody answers at: no report can be sent once the other addresses fail."""
    found = []
    for greeting in await context.greetings.result():
        where = split(greeting.url)
        known = context.http.names.known(where.host)
        if greeting.status is None or len(known) < 2:
            continue
        reached = await asyncio.gather(*(_accepts(address, where.port) for address in known))
        unreachable = [str(a) for a, accepts in zip(known, reached, strict=True) if not accepts]
        found.append(about_addresses(where.host, where.port, unreachable))
    return found


async def _accepts(address: IPAddress, port: int) -> bool:
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            (await connected(address, port)).close()
    except OSError:  # TimeoutError is one
        return False
    return True


def about_addresses(host: str, port: int, unreachable: Sequence[str]) -> Check:
    if not unreachable:
        return ok("server addresses", f"every address of {host} answers on port {port}")
    means = "when the other addresses cannot be reached, no report arrives, and the tunnel counts as silent."
    fix = f"let the server listen there (VPN_SENTINEL_SERVER_HOST=::), or remove the address from the DNS of {host}"
    return gap("server addresses", f"nobody answers at {', '.join(unreachable)} port {port}", means, fix)


async def echo(context: DoctorContext) -> list[Check]:
    for greeting in await context.greetings.result():
        welcome = greeting.welcome
        if welcome is None or welcome.echo is None:
            continue
        ident, key = bytes.fromhex(welcome.echo.id), bytes.fromhex(welcome.echo.key)
        answers = []
        for address in _one_per_family(context.http.names.known(split(greeting.url).host)):
            target = ServerEcho(address, welcome.echo.port, ident, key)
            payload, read = target.question()
            outcome = await ask(DatagramTarget(address=address, port=target.port), payload, read)
            answers.append((address, outcome.answer))
        return [about_echo(welcome.echo.port, answers)]
    return []


def _one_per_family(addresses: Sequence[IPAddress]) -> list[IPAddress]:
    return list({a.version: a for a in reversed(addresses)}.values())


def about_echo(port: int, answers: Sequence[tuple[IPAddress, Answer]]) -> Check:
    answering = [str(address) for address, answer in answers if answer is Answer.ANSWERED]
    if answering:
        return ok("pulse", f"the server's UDP port {port} answers at {', '.join(answering)}")
    means = "no pulses: a dead tunnel is noticed by the connection or by public services, seconds later."
    return gap("pulse", f"the server's UDP port {port} does not answer", means, f"let UDP {port} pass to the server")


async def zone(context: DoctorContext) -> list[Check]:
    welcome = next((g.welcome for g in await context.greetings.result() if g.welcome), None)
    if welcome is None:
        return []
    learned = dns.LearnedZone()
    learned.learn(welcome.canary_zone, welcome.echo)
    if learned.zone is None:
        return [about_zone(welcome.canary_zone, None)]
    seen = [await dns.sighting(server, learned.zone) for server in dns.system_nameservers()]
    return [about_zone(welcome.canary_zone, [s.egress for s in seen if s is not None])]


def about_zone(name: str | None, egresses: Sequence[IPAddress | None] | None) -> Check:
    if name is None:
        return ok("DNS zone", "the server has none", "resolvers are identified by public whoami names.")
    if egresses is None:
        return unknown("DNS zone", f"names below {name} cannot be queried")
    if found := ", ".join(dict.fromkeys(str(e) for e in egresses if e)):
        return ok("DNS zone", f"{name} reaches the server; it is queried from {found}")
    means = "resolvers are identified by public whoami names only."
    fix = f"delegate {name} to the server (an NS record above it), and let UDP and TCP 53 pass to it"
    return gap("DNS zone", f"a name below {name} has no answer from the server", means, fix)
