"""Notices in words: plain lines, and Telegram's HTML. Everything from outside is cleaned, clipped and escaped.

Each line stands for itself (no tag spans two), so a long text can be cut at any line border. This module words what a
notice says; it judges nothing.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Final, Protocol

from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.domain.verdict import State

# Characters kept of one text from outside, and of lists of such texts.
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
    Kind.SERVER_RECOVERED: (ICON[State.PROTECTED], "VPN Sentinel keeps up again"),
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
# What a reference agent stands for is the home connection of its site.
_HOME: Final[Mapping[Kind, str]] = {
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
    """`label: value`. `fixed` values (addresses) are set in a fixed-width face where there is one."""

    label: str
    value: str
    fixed: bool = False


def plain(notice: Notice, zone: tzinfo | None = None) -> str:
    """The notice as lines of plain text. `zone` is where its times are told, None the process's own (`TZ`)."""
    rows = (f"{line.label}: {line.value}" if line.label else line.value for line in _lines(notice, zone))
    return "\n".join((headline(notice), *rows))


def brief(notice: Notice, zone: tzinfo | None = None) -> str:
    """What may never be lost of a notice, in two short lines of plain text: for whoever takes no more."""
    return f"{headline(notice)}\nTime: {moment(notice.at, zone)}"


def html(notice: Notice, zone: tzinfo | None = None) -> str:
    """The notice in the Bot API's HTML (https://core.telegram.org/bots/api#html-style), one element a line at most."""
    return "\n".join((f"<b>{escape(headline(notice))}</b>", *map(html_line, _lines(notice, zone))))


def html_line(line: Line) -> str:
    value = f"<code>{escape(line.value)}</code>" if line.fixed else escape(line.value)
    return f"<b>{escape(line.label)}:</b> {value}" if line.label else value


def headline(notice: Notice) -> str:
    """What to see at a glance: which tunnel, and how it stands."""
    icon, words = _HEADLINE[notice.kind]
    if notice.role == "reference":
        words = _HOME.get(notice.kind, words)
    if notice.first:
        words = words.removesuffix(" again")
    said = words.format(tunnel=clean(notice.tunnel) or "A tunnel", site=clean(notice.site) or "a site")
    if notice.outage is not None:
        said += f" after {duration(notice.outage)}"
    if notice.kind is Kind.DOWN and notice.was is State.LEAKING:
        said += " and leaks no more"
    elif notice.was is not None:
        said += f" (it was {notice.was})"
    return f"{icon} {said}"


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
        # Where there is trouble, this address is the last good one or the leak itself: the findings say which.
        label = "Exit" if notice.role != "reference" else "Home address"
        late = notice.kind in (Kind.LEAKING, Kind.DOWN, Kind.SILENT, Kind.UNVERIFIED)
        yield Line(f"{label} last seen" if late else label, str(notice.exit), fixed=True)
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
        yield Line("", f"… and {len(notice.findings) - _MAX_LISTED} more findings")
    for advice in dict.fromkeys(f.advice for f in notice.findings[:_MAX_LISTED]):
        yield Line("What to do", clean(advice))


class Explained(Protocol):
    """A finding of the judge, or one that a database held."""

    @property
    def message(self) -> str: ...
    @property
    def evidence(self) -> Mapping[str, str]: ...


def explain(finding: Explained) -> str:
    """A finding's message, and those of its facts that the message does not name yet."""
    message = clean(finding.message)
    facts = [
        f"{clean(key).replace('_', ' ')}: {shown}"
        for key, value in list(finding.evidence.items())[:_MAX_LISTED]
        if (shown := clean(value, 160)) and not _is_said(shown, message)
    ]
    return f"{message} ({', '.join(facts)})" if facts else message


def _is_said(fact: str, message: str) -> bool:
    """Whether the message names a fact already; a number within an address is no mention of it."""
    return re.search(rf"(?<![\w.:]){re.escape(fact)}(?![\w:]|\.\w)", message, re.IGNORECASE) is not None


def listing(values: Sequence[str]) -> str:
    shown = ", ".join(clean(value, 100) for value in values[:_MAX_LISTED])
    return f"{shown} and {len(values) - _MAX_LISTED} more" if len(values) > _MAX_LISTED else shown


def moment(at: float, zone: tzinfo | None = None) -> str:
    """`2026-01-02 13:04:05 CET (12:04:05 UTC)`, or the UTC part alone where that is the local time."""
    try:
        utc = datetime.fromtimestamp(at, UTC)
        local = utc.astimezone(zone)
    except (OverflowError, ValueError, OSError):
        return "an unknown time"
    if local.utcoffset() == utc.utcoffset():
        return f"{utc:%Y-%m-%d %H:%M:%S} UTC"
    return f"{local:%Y-%m-%d %H:%M:%S %Z} ({utc:%H:%M:%S} UTC)"


def duration(seconds: float) -> str:
    """A length of time in words, its two largest units: `1 hour 5 minutes`."""
    left = max(0, round(seconds))
    parts = []
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}{'s' if count != 1 else ''}")
        elif parts:
            break  # "1 day 5 seconds" claims a precision that nobody asked for
    return " ".join(parts[:2]) or "less than a second"


def clean(text: str, most: int = _MAX_TEXT_LENGTH) -> str:
    """One line without control, invisible, text-turning and surrogate characters; at most `most` long."""
    kept = "".join(
        " " if c.isspace() else c for c in text[: most * 4] if c.isspace() or unicodedata.category(c)[0] != "C"
    )
    line = " ".join(kept.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def escape(text: str) -> str:
    """For the text of an element, which is the only place where anything from outside stands."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
