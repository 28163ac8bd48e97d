"""Whom the canaries of a round ask, by the settings: for the agent and for `check`."""

import logging
from dataclasses import replace

from vpn_sentinel.agent.leakwatch.senders import Senders, senders
from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.endpoints import TCP
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.urls import address_in, split
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.agent.probes.canary import CanaryPlan, OverTcp
from vpn_sentinel.agent.probes.gateway import gateway
from vpn_sentinel.agent.probes.targets import CLOUDFLARE, OPENDNS, Target
from vpn_sentinel.agent.probes.trace import TRACE_TIMEOUT_S, TRACE_URL, TRACE_URL_6, trace
from vpn_sentinel.agent.settings import ProbeSettings
from vpn_sentinel.domain.observation import Canary, Path

log = logging.getLogger(__name__)

# The time of silence, and the time for canaries then: together longer than the grace of a dead tunnel.
_SILENT_S, _HURRIED_TIMEOUT_S = 0.7, 1.1


def canary_plan(
    settings: ProbeSettings,
    http: Client,
    echoes: tuple[Target, ...],
    paths: Paths,
    *,
    silent_for: float = 0.0,
    pulsed: bool = False,
) -> CanaryPlan:
    """Whom a round asks: the server's echo and Cloudflare, then OpenDNS, then Cloudflare over HTTPS.

    HTTPS is for networks that pass no datagram. It gets less time where pulses have had replies until now (`pulsed`),
    or have had none for most of a second (`silent_for`, seconds).
    """
    if AS_USER.refused:
        # Canaries of this process would show the route of other users, which may leave outside the tunnel.
        return CanaryPlan(targets=(), reserve=())
    timeout_s = _HURRIED_TIMEOUT_S if pulsed or silent_for >= _SILENT_S else TRACE_TIMEOUT_S
    # A nameserver in use is judged as one: what escapes to it is a DNS leak, and tells nothing about other traffic.
    nameservers = {server.address for server in dns.system_nameservers()}
    usual, reserve = (tuple(t for t in some if t.address not in nameservers) for some in (CLOUDFLARE, OPENDNS))
    if len(usual) < len(CLOUDFLARE):
        usual, reserve = (*usual, *reserve), ()
    return CanaryPlan(
        targets=(*echoes, *usual),
        reserve=reserve,
        others=tuple(_over_https(url, http, paths, timeout_s) for url in _traces(settings.trace_url)),
        marked=marks_lead_out(paths.survey),
        gateway=gateway(paths, (n.address for n in dns.system_nameservers())),
        may_leave=settings.policy.allows_outside,
    )


def marks_lead_out(survey: Survey) -> bool:
    """Whether a routing rule leads marked packets past the tunnel: a VPN program's, or what a firewall marks."""
    fib, device = survey.fib, survey.device()
    if fib is None or device is None:
        return False
    excepted = senders(fib, device.index, Senders()).excepted
    return any(rule.mark for rule in excepted if not any(r.invert and r.mark == rule.mark for r in fib.rules))


def _traces(url: str) -> tuple[str, ...]:
    """The trace service, and its IPv6 address where it is Cloudflare's."""
    return (url, TRACE_URL_6) if url == TRACE_URL else (url,)


def _over_https(url: str, http: Client, paths: Paths, timeout_s: float) -> OverTcp:
    parts, path = split(url), path_to(url, paths)
    address = address_in(parts.host)
    family = address.version if address is not None else 4

    async def ask() -> Canary:
        # Another tunnel may have come up meanwhile and carried the response.
        excepted = await trace(http, url, path, timeout_s, family)
        return excepted if path_to(url, paths) is path else replace(excepted, path=Path.UNKNOWN)

    return OverTcp(
        ask=ask,
        address=address,
        port=parts.port,
        path=path,
        family=family,
    )


def path_to(url: str, paths: Paths) -> Path:
    """How the kernel would route a request to `url`; unknown for a host name, whose address is not known yet."""
    parts = split(url)
    address = address_in(parts.host)
    return Path.UNKNOWN if address is None else paths.of(address, parts.port, TCP)
