"""The answer to /status: rows of `tunnels` in Telegram's HTML, the worst first. Renders states, computes none."""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import tzinfo
from typing import Any, Final

from sqlalchemy import Row, Select, select

from vpn_sentinel.domain.verdict import HARM, Finding, State
from vpn_sentinel.server.notify.text import ICON, Line, clean, duration, escape, explain, html_line, moment
from vpn_sentinel.server.store.schema import tunnels
from vpn_sentinel.wire.codec import decoder

_OTHER_ICON: Final = "▫️"  # a state that is not the judge's, such as an operator's pause
_FINDINGS: Final = 4
_ICON: Final = {str(state): icon for state, icon in ICON.items()}
_HARM: Final = {str(state): rank for rank, state in enumerate(HARM)}

_findings = decoder(tuple[Finding, ...])
_place = decoder(dict[str, str | int | float | None])


def statement() -> Select[Any]:
    """What `render` needs."""
    c = tunnels.c
    return select(c.name, c.state, c.since, c.findings, c.exit4, c.exit6, c.place, c.last_seen).order_by(c.name)


def render(rows: Sequence[Row[Any]], now: float, zone: tzinfo | None = None) -> str:
    """All tunnels; `rows` are those of `statement`, `now` is seconds since the epoch."""
    if not rows:
        return "No tunnel has reported yet."
    ranked = sorted(rows, key=lambda row: _rank(row.state))
    counted = Counter(row.state for row in ranked)
    total = f"{len(rows)} tunnel{'s' if len(rows) != 1 else ''}: " + ", ".join(f"{n} {s}" for s, n in counted.items())
    return "\n\n".join((f"<b>{escape(clean(total))}</b>", *("\n".join(_tunnel(row, now, zone)) for row in ranked)))


def _rank(state: str) -> int:
    return _HARM.get(state, len(_HARM))


def _tunnel(row: Row[Any], now: float, zone: tzinfo | None) -> Iterator[str]:
    icon = _ICON.get(row.state, _OTHER_ICON)
    word = row.state.upper() if row.state == State.LEAKING else row.state
    yield f"{icon} <b>{escape(clean(row.name))}</b> {escape(clean(word))} for {duration(now - row.since)}"
    try:
        findings = _findings(row.findings)
    except (ValueError, RecursionError):
        findings = ()
        yield "What was found cannot be read: a newer server wrote it."
    for finding in findings[:_FINDINGS]:
        yield html_line(Line("", explain(finding)))
    if len(findings) > _FINDINGS:
        yield f"… and {len(findings) - _FINDINGS} more findings"
    ip, where = _where(row.place)
    for address in (row.exit4, row.exit6):
        if address:
            yield html_line(Line("Exit", clean(address), fixed=True))
        if address and where and address == ip:
            yield html_line(Line("Place", where))
    yield html_line(Line("Since", moment(row.since, zone)))
    if row.last_seen > 0:
        yield html_line(Line("Last report", f"{duration(now - row.last_seen)} ago"))


def _where(place: str) -> tuple[str, str]:
    """The address that a place is known of, and the place."""
    try:
        found = _place(place)
    except (ValueError, RecursionError):
        return "", ""
    parts = (clean(str(found[key]), 100) for key in ("city", "region", "country", "org") if found.get(key))
    return str(found.get("ip", "")), ", ".join(dict.fromkeys(part for part in parts if part))
