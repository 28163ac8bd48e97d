"""The answer to /status: all tunnels in Telegram's HTML, the worst first. It renders states and computes none."""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import tzinfo
from typing import Final

from vpn_sentinel.domain.counted import counted
from vpn_sentinel.domain.verdict import HARM, State
from vpn_sentinel.server.notify.text import ICON, Line, clean, duration, escape, explain, html_line, moment
from vpn_sentinel.wire import rest

_MAX_FINDINGS: Final = 4


def render(tunnels: Sequence[rest.Tunnel], now: float, zone: tzinfo | None = None) -> str:
    """All of `tunnels`; `now` is seconds since the epoch."""
    if not tunnels:
        return "No tunnel has reported yet."
    ranked = sorted(tunnels, key=lambda t: HARM.index(t.state))
    states = Counter(t.state.value for t in ranked)
    total = f"{counted(len(ranked), 'tunnel')}: " + ", ".join(f"{n} {state}" for state, n in states.items())
    return "\n\n".join((f"<b>{escape(clean(total))}</b>", *("\n".join(_tunnel(t, now, zone)) for t in ranked)))


def _tunnel(tunnel: rest.Tunnel, now: float, zone: tzinfo | None) -> Iterator[str]:
    state, since = tunnel.state, tunnel.since.timestamp()
    word = state.value.upper() if state is State.LEAKING else state.value
    yield f"{ICON[state]} <b>{escape(clean(tunnel.name))}</b> {escape(word)} for {duration(now - since)}"
    for finding in tunnel.findings[:_MAX_FINDINGS]:
        yield html_line(Line("", explain(finding)))
    if len(tunnel.findings) > _MAX_FINDINGS:
        yield f"… and {counted(len(tunnel.findings) - _MAX_FINDINGS, 'more finding')}"
    where = _where(tunnel.place)
    for address in (tunnel.exit.ipv4, tunnel.exit.ipv6):
        if address:
            yield html_line(Line("Exit", clean(address), fixed=True))
        if address and where and address == tunnel.place.ip:
            yield html_line(Line("Place", where))
    yield html_line(Line("Since", moment(since, zone)))
    if tunnel.last_seen is not None:
        yield html_line(Line("Last report", f"{duration(now - tunnel.last_seen.timestamp())} ago"))


def _where(place: rest.PlaceBody) -> str:
    parts = (clean(part, 100) for part in (place.city, place.region, place.country, place.org) if part)
    return ", ".join(dict.fromkeys(part for part in parts if part))
