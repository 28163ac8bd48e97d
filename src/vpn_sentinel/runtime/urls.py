"""Check addresses of HTTP servers as people write them, with an exact message for each error.

No message repeats the address: it may hold a token.
"""

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?", re.ASCII | re.IGNORECASE)
_FOUR_NUMBERS: Final = re.compile(r"[0-9]+(\.[0-9]+){3}", re.ASCII)
_NEXT_URL: Final = re.compile(r"[,;]https?://", re.ASCII | re.IGNORECASE)
_MAX_LABEL_LENGTH: Final = 63
_MAX_NAME_LENGTH: Final = 253
_BRACKETED: Final = re.compile(r"\[([^\[\]]+)\](:.*)?")
_BRACKETS: Final = "takes an IPv6 address in brackets, and nothing else in them: https://[2001:db8::1]:5000"
_ESCAPES: Final = "write / ? # @ of a password as %2F %3F %23 %40"


def address_of(value: str) -> str:
    """Return `value`, unchanged, if it is an http or https address with a host. Raises ValueError with the reason."""
    if problem := _problem(value):
        raise ValueError(problem)
    return value


def _problem(value: str) -> str:
    if any(c.isspace() for c in value):
        return "holds a space, which no address holds: %20 stands for one"
    scheme, colon, rest = value.partition("://")
    if not colon or scheme.lower() not in ("http", "https"):
        return "is not an address that starts with http:// or https://"
    if _NEXT_URL.search(rest.partition("?")[0]):
        return "is more than one address, and one is wanted"
    try:
        parts = urlsplit(value)
        host = parts.hostname or ""
    except ValueError:  # its own text would repeat the host
        return _BRACKETS
    if problem := _bracket_problem(parts.netloc) or host_problem(host) or _port_problem(value):
        return problem
    if not (rest.partition(parts.netloc)[2].isascii() and value.isprintable()):
        return "holds characters that an address cannot hold: write them as %XX"
    return ""


def _bracket_problem(netloc: str) -> str:
    host_part = netloc.rpartition("@")[2]
    if "[" in host_part or "]" in host_part:
        found = _BRACKETED.fullmatch(host_part)
        return "" if found and ":" in found[1] and _address(found[1]) is not None else _BRACKETS
    return _BRACKETS if host_part.count(":") > 1 and _address(host_part) is not None else ""


def _port_problem(value: str) -> str:
    parts = urlsplit(value)
    try:
        if parts.port != 0:
            return ""
    except ValueError:
        pass
    hint = f" ({_ESCAPES})" if "@" in value else ""
    return f"has a port that is no number from 1 to 65535{hint}"


def is_host(text: str) -> bool:
    """Whether it is an IP address, or a name that can be resolved: labels of 1 to 63 bytes (RFC 1123, RFC 5890).

    `_` is allowed: host names have none, but many containers' names do.
    """
    return not host_problem(text)


def host_problem(text: str) -> str:
    """Why a host is invalid, as the end of a sentence that begins with the setting; "" when it is valid."""
    if _address(text) is not None:
        return (
            "takes no zone of an IPv6 address (% and what follows it): name the host otherwise" if "%" in text else ""
        )
    if not text:
        return "names no host"
    name = text.removesuffix(".")
    if "" in name.split("."):
        return "names a host with an empty part: two dots beside each other, or one in front"
    if _FOUR_NUMBERS.fullmatch(name):
        return "names a host of four numbers that is no IPv4 address: each goes from 0 to 255, without zeros in front"
    try:
        if not name.isascii():  # the codec's tables take 0.5 MB
            name = name.encode("idna").decode("ascii")
        for label in name.split("."):
            if label.lower().startswith("xn--"):
                label[4:].encode("ascii").decode("punycode")
    except UnicodeError:  # also for a label that becomes too long
        return "names a host with a part that cannot be written in ASCII (IDNA)"
    return _name_problem(name)


def _name_problem(name: str) -> str:
    labels = name.split(".")
    if len(name) > _MAX_NAME_LENGTH:
        return f"names a host of {len(name)} characters, and takes {_MAX_NAME_LENGTH}"
    if any(len(label) > _MAX_LABEL_LENGTH for label in labels):
        return f"names a host with a part of more than {_MAX_LABEL_LENGTH} characters"
    if not all(_LABEL.fullmatch(label) and label.lower() != "xn--" for label in labels):
        return "names a host with characters that no name takes: letters, digits, '-' inside, and '_'"
    return ""


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
