"""Notices as text: plain lines, and Telegram's HTML. Everything from outside is cleaned, shortened and escaped.

No tag spans two lines, so a long text can be split at any line break. This module only words what a notice says.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Final, Protocol

from vpn_sentinel.domain.counted import counted
from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.domain.verdict import State

# Bounds of texts from outside: the characters of one, and the items of a list.
_MAX_TEXT_LENGTH: Final = 300
_MAX_LISTED: Final = 8

ICON: Final[Mapping[State, str]] = {
    State.LEAKING: "🔴",
    State.DOWN: "🟠",
    State.DEGRADED: "🟡",
    State.SILENT: "⚫",
    State.UNVERIFIED: "🟣",
    State.PENDING: "⚪",
    State.UNKNOWN: "⚪",
    State.PROTECTED: "🟢",
}
_HEADLINE: Final[Mapping[Kind, tuple[str, str]]] = {
    Kind.SERVER_STARTED: ("🚀", "VPN Sentinel has started"),
    Kind.DATABASE_DAMAGED: ("🛑", "VPN Sentinel's own database has damage"),
    Kind.SERVER_OVERLOADED: ("🐌", "VPN Sentinel has too much to do"),
    Kind.SERVER_RECOVERED: (ICON[State.PROTECTED], "VPN Sentinel can keep up again"),
    Kind.CONNECTED: (ICON[State.PROTECTED], "{tunnel} is connected and protected"),
    Kind.ADDRESS_CHANGED: ("🔵", "{tunnel} has a new exit address"),
    Kind.PORT_CHANGED: ("🔵", "{tunnel} has another forwarded port"),
    Kind.LEAKING: (ICON[State.LEAKING], "{tunnel} is LEAKING"),
    Kind.DOWN: (ICON[State.DOWN], "{tunnel} is down"),
    Kind.DEGRADED: (ICON[State.DEGRADED], "{tunnel} is degraded"),
    Kind.SILENT: (ICON[State.SILENT], "{tunnel} is silent"),
    Kind.UNVERIFIED: (ICON[State.UNVERIFIED], "{tunnel} cannot be verified"),
    Kind.RECOVERED: (ICON[State.PROTECTED], "{tunnel} is protected again"),
    Kind.TEST: ("🔔", "Test message of VPN Sentinel"),
}
# Notices of a reference agent are about the home connection of its site.
_REFERENCE_HEADLINE: Final[Mapping[Kind, str]] = {
    Kind.CONNECTED: "Home internet of {site} works",
    Kind.ADDRESS_CHANGED: "Home internet of {site} has a new address",
    Kind.DOWN: "Home internet of {site} is down",
    Kind.DEGRADED: "Home internet of {site} is degraded",
    Kind.SILENT: "The reference agent of {site} is silent",
    Kind.UNVERIFIED: "Home internet of {site} cannot be verified",
    Kind.RECOVERED: "Home internet of {site} works again",
}
_TROUBLE: Final = frozenset({Kind.LEAKING, Kind.DOWN, Kind.DEGRADED, Kind.SILENT, Kind.UNVERIFIED})


@dataclass(frozen=True, slots=True)
class Line:
    """`label: value`. `fixed` values (addresses) are shown in a fixed-width font where there is one."""

    label: str
    value: str
    fixed: bool = False


def plain(notice: Notice, zone: tzinfo | None = None) -> str:
    """The notice as lines of plain text. `zone` is the time zone of its times, None for the process's own (`TZ`)."""
    rows = (f"{line.label}: {line.value}" if line.label else line.value for line in _lines(notice, zone))
    return "\n".join((headline(notice), *rows))


def brief(notice: Notice, zone: tzinfo | None = None) -> str:
    """The essence of a notice in two short lines of plain text, for a receiver that accepts no more."""
    return f"{headline(notice)}\nTime: {moment(notice.at, zone)}"


def html(notice: Notice, zone: tzinfo | None = None) -> str:
    """The notice in the Bot API's HTML (https://core.telegram.org/bots/api#html-style), at most one element a line."""
    return "\n".join((f"<b>{escape(headline(notice))}</b>", *map(html_line, _lines(notice, zone))))


def html_line(line: Line) -> str:
    value = f"<code>{escape(line.value)}</code>" if line.fixed else escape(line.value)
    return f"<b>{escape(line.label)}:</b> {value}" if line.label else value


def headline(notice: Notice) -> str:
    """The first line: which tunnel, and its state."""
    icon, sentence = _HEADLINE[notice.kind]
    if notice.role == "reference":
        sentence = _REFERENCE_HEADLINE.get(notice.kind, sentence)
    if notice.first:
        sentence = sentence.removesuffix(" again")
    title = sentence.format(tunnel=clean(notice.tunnel) or "A tunnel", site=clean(notice.site) or "a site")
    if notice.outage is not None:
        title += f" after {duration(notice.outage)}"
    if notice.kind is Kind.DOWN and notice.was is State.LEAKING:
        title += " and no longer leaks"
    elif notice.was is not None:
        title += f" (it was {notice.was})"
    return f"{icon} {title}"


def _lines(notice: Notice, zone: tzinfo | None) -> Iterator[Line]:
    """In the order of a reader's questions: why, what to do, where, when."""
    yield from _reasons(notice)
    yield from (Line("", clean(detail)) for detail in notice.details[:_MAX_LISTED])
    if notice.port is not None:
        yield Line(
            "Forwarded port",
            str(notice.port) if notice.old_port is None else f"{notice.old_port} → {notice.port}",
            fixed=True,
        )
        yield Line("What to do", "Set the new port in the program that is to be reached by it.")
    if notice.old_exit is not None and notice.exit is not None:
        yield Line("Exit", f"{notice.old_exit} → {notice.exit}", fixed=True)
    elif notice.exit is not None:
        # In trouble, this address is the last good one or the leak itself: the findings say which.
        label = "Exit" if notice.role != "reference" else "Home address"
        is_old = notice.kind in (Kind.LEAKING, Kind.DOWN, Kind.SILENT, Kind.UNVERIFIED)
        yield Line(f"{label} last seen" if is_old else label, str(notice.exit), fixed=True)
    for label, value in (
        ("Place", clean(notice.place)),
        ("Provider", clean(notice.provider)),
        ("Time zone", clean(notice.timezone)),
        ("Resolvers", listing(notice.resolvers)),
        ("Site", clean(notice.site)),
    ):
        if value:
            yield Line(label, value)
    if notice.began is not None and notice.began != notice.at:
        yield Line("Began", moment(notice.began, zone))
    yield Line("Time", moment(notice.at, zone))


def _reasons(notice: Notice) -> Iterator[Line]:
    for finding in notice.findings[:_MAX_LISTED]:
        yield Line("Why" if notice.kind in _TROUBLE else "Note", explain(finding))
    if len(notice.findings) > _MAX_LISTED:
        yield Line("", f"… and {counted(len(notice.findings) - _MAX_LISTED, 'more finding')}")
    for advice in dict.fromkeys(f.advice for f in notice.findings[:_MAX_LISTED]):
        yield Line("What to do", clean(advice))


class Explained(Protocol):
    """A finding of the judge, or one read from the database."""

    @property
    def message(self) -> str: ...
    @property
    def evidence(self) -> Mapping[str, str]: ...


def explain(finding: Explained) -> str:
    """A finding's message, with those of its facts that the message does not mention."""
    message = clean(finding.message)
    facts = [
        f"{clean(key).replace('_', ' ')}: {shown}"
        for key, value in list(finding.evidence.items())[:_MAX_LISTED]
        if (shown := clean(value, 160)) and not _is_mentioned(shown, message)
    ]
    return f"{message} ({', '.join(facts)})" if facts else message


def _is_mentioned(fact: str, message: str) -> bool:
    """Whether the message mentions a fact; a number within an address is no mention of that number."""
    return re.search(rf"(?<![\w.:]){re.escape(fact)}(?![\w:]|\.\w)", message, re.IGNORECASE) is not None


def listing(values: Sequence[str]) -> str:
    shown = ", ".join(clean(value, 100) for value in values[:_MAX_LISTED])
    return f"{shown} and {len(values) - _MAX_LISTED} more" if len(values) > _MAX_LISTED else shown


def moment(at: float, zone: tzinfo | None = None) -> str:
    """`2026-01-02 13:04:05 CET (12:04:05 UTC)`, or only the UTC time where that is the local time."""
    try:
        utc = datetime.fromtimestamp(at, UTC)
        local = utc.astimezone(zone)
    except (OverflowError, ValueError, OSError):
        return "an unknown time"
    if local.utcoffset() == utc.utcoffset():
        return f"{utc:%Y-%m-%d %H:%M:%S} UTC"
    return f"{local:%Y-%m-%d %H:%M:%S %Z} ({utc:%H:%M:%S} UTC)"


def duration(seconds: float) -> str:
    """A duration in words, with its two largest units: `1 hour 5 minutes`."""
    rest = max(0, round(seconds))
    parts = []
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(counted(count, unit))
        elif parts:
            break  # "1 day 5 seconds" would be too precise
    return " ".join(parts[:2]) or "less than a second"


def clean(text: str, max_chars: int = _MAX_TEXT_LENGTH) -> str:
    """One line without control, invisible, bidirectional and surrogate characters; at most `max_chars` long."""
    kept = "".join(
        " " if c.isspace() else c for c in text[: max_chars * 4] if c.isspace() or unicodedata.category(c)[0] != "C"
    )
    line = " ".join(kept.split())
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"


def escape(text: str) -> str:
    """Escape the text of an element, the only place for text from outside."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
