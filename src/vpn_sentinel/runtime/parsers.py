"""Parsers of settings: each takes a setting's text and returns its value, or raises ValueError.

The error's text follows the setting's name: it says what is wrong, or what the setting takes.
"""

import errno
import ipaddress
import os
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from vpn_sentinel.runtime.addresses import NAT64, parse_address, parse_network
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.urls import address_of, is_host

# ISO 3166-1 alpha-2, as of 2024, and XK, which geolocation databases use for Kosovo.
_COUNTRIES: Final = """
    AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ
    CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR
    GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT
    JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO
    MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY
    QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO
    TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS XK YE YT ZA ZM ZW
    """
_COUNTRY_CORRECTIONS: Final = {"UK": "GB", "EN": "GB", "EL": "GR", "SP": "ES", "JA": "JP", "DA": "DK", "CS": "CZ"}

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# Defaults of lists: a bare () has no element type.
NO_TEXTS: Final[tuple[str, ...]] = ()
NO_ADDRESSES: Final[tuple[IPAddress, ...]] = ()
NO_NETWORKS: Final[tuple[IPNetwork, ...]] = ()

# No home's packets come from these on the internet: this host, link-local, multicast, other forms of IPv4 addresses.
_NEVER_HOME: Final[tuple[IPNetwork, ...]] = (
    *(ipaddress.ip_network(n) for n in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4")),
    *(ipaddress.ip_network(n) for n in ("::/96", "fe80::/10", "ff00::/8")),
    NAT64,
)


def text(value: str) -> str:
    return value


def secret(value: str) -> Secret:
    """One line of printable characters."""
    if not value.isprintable():
        msg = "takes one line of printable characters"
        raise ValueError(msg)
    return Secret(value)


def header(value: str) -> Secret:
    """A secret for an HTTP header."""
    if not (value.isascii() and value.isprintable()):
        msg = "takes printable ASCII characters"
        raise ValueError(msg)
    return Secret(value)


def boolean(value: str) -> bool:
    match value.strip().lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
        case _:
            msg = f"{value!r} is not one of true, false"
            raise ValueError(msg)


def number(least: float, most: float, unit: str = "") -> Callable[[str], float]:
    """A parser of a number between `least` and `most`, both included."""

    def parse(value: str) -> float:
        try:
            found = float(value)
        except ValueError:
            found = float("nan")
        if not least <= found <= most:
            msg = f"{value!r} is not a number from {least:g} to {most:g}{' ' + unit if unit else ''}"
            raise ValueError(msg)
        return found

    return parse


def share(value: str) -> float:
    """A share from 0 to 1, as a number or in percent: `0.05`, `5%`."""
    digits = value.removesuffix("%")
    try:
        found = float(digits) / (1 if digits == value else 100)
    except ValueError:
        found = float("nan")
    if not 0 <= found <= 1:
        msg = f"{value!r} is not a share from 0 to 1, nor a percentage such as 5%"
        raise ValueError(msg)
    return found


def integer(least: int, most: int) -> Callable[[str], int]:
    """A parser of a whole number between `least` and `most`, both included."""

    def parse(value: str) -> int:
        if not value.strip().isascii() or not value.strip().isdigit() or not least <= int(value) <= most:
            msg = f"{value!r} is not a whole number from {least} to {most}"
            raise ValueError(msg)
        return int(value)

    return parse


port: Final = integer(1, 65535)


def words(value: str) -> tuple[str, ...]:
    """Items separated by commas: paths, which may hold spaces."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


def listed(value: str) -> tuple[str, ...]:
    """Items separated by commas, spaces or line ends."""
    return tuple(value.replace(",", " ").split())


def url(value: str, *, login: str = "takes no login (what stands before an @)") -> str:
    """A base address, http or https, without its trailing slash and without a login, which would not be sent.

    `login` is the error's text for one.
    """
    found = url_with_login(value)
    if "@" in urlsplit(found).netloc:
        raise ValueError(login)
    return found


def url_with_login(value: str) -> str:
    """A base address that may hold a login."""
    found = address_of(value)
    if "?" in found or "#" in found:
        msg = "is the address that others begin with: it takes no ? and no #"
        raise ValueError(msg)
    return found.rstrip("/")


def listening_host(value: str) -> str:
    """An address to listen on, or this host's name. Raises ValueError."""
    bare = _without_brackets(value)
    if not is_host(bare):
        msg = f"{value!r} is neither an address nor a name"
        raise ValueError(msg)
    try:
        return str(parse_address(bare))
    except ValueError:
        return bare


def _without_brackets(value: str) -> str:
    """An IPv6 address without the brackets of a URL."""
    return value[1:-1] if value.startswith("[") and value.endswith("]") and ":" in value else value


def path(value: str) -> str:
    """The prefix of every route: with a slash at the start and none at the end."""
    found = "/" + "/".join(part for part in value.split("/") if part)
    if found == "/" or not found.isascii() or not all(c.isalnum() or c in "/-_." for c in found):
        msg = f"{value!r} is not a path such as /api/v1"
        raise ValueError(msg)
    return found


def urls(value: str) -> tuple[str, ...]:
    parts = listed(value)
    return tuple(_url_of_list(part, n, len(parts)) for n, part in enumerate(parts, 1))


def _url_of_list(value: str, number: int, of: int) -> str:
    try:
        return url(value)
    except ValueError as e:
        if of == 1:
            raise
        msg = f"address {number} of {of} {e}"  # not the address, which may hold a login
        raise ValueError(msg) from e


def networks(value: str) -> tuple[IPNetwork, ...]:
    """Addresses and CIDR blocks, separated by commas or spaces."""
    return tuple(parse_network(_without_brackets(part)) for part in listed(value))


def home_networks(value: str) -> tuple[IPNetwork, ...]:
    """The same for a home: ValueError for addresses that nothing on the internet comes from, which match no leak."""
    found = networks(value)
    for network in found:
        if any(network.version == no.version and network.subnet_of(no) for no in _NEVER_HOME):  # type: ignore[arg-type]
            msg = f"{network} is nothing that a home is seen by: its public addresses are, such as 198.51.100.7"
            raise ValueError(msg)
    return found


def addresses(value: str) -> tuple[IPAddress, ...]:
    """Addresses, separated by commas or spaces."""
    return tuple(parse_address(_without_brackets(part)) for part in listed(value))


def countries(value: str) -> tuple[str, ...]:
    """ISO 3166-1 alpha-2 codes, separated by commas or spaces."""
    found = tuple(part.upper() for part in listed(value))
    for code in found:
        if len(code) != 2 or not code.isascii() or not code.isalpha():
            msg = f"{code!r} is not a country code of two letters"
            raise ValueError(msg)
        if code not in _COUNTRIES:
            meant = f": {_COUNTRY_CORRECTIONS[code]} is meant?" if code in _COUNTRY_CORRECTIONS else ""
            msg = f"{code!r} is no country in ISO 3166-1{meant}"
            raise ValueError(msg)
    return found


def one_of(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.lower() not in allowed:
            msg = f"{value!r} is not one of {', '.join(allowed)}"
            raise ValueError(msg)
        return value.lower()

    return parse


def mode_of(path: str) -> int:
    """The mode of a file (inode(7)), 0 when it is missing or may not be examined."""
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):
        return 0


def authorities(value: str) -> Path:
    """A file of certificates, PEM, that OpenSSL accepts."""
    path = readable_file(value)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as e:  # ssl.SSLError is one
        msg = f"{value} holds no certificates that can be used (PEM)"
        raise ValueError(msg) from e
    return path


def readable_file(value: str) -> Path:
    """A regular file: opening a pipe would wait for a writer."""
    path = Path(value)
    mode = mode_of(value)
    if mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        msg = f"{value} is no regular file"
        raise ValueError(msg)
    try:
        with path.open("rb"):
            return path
    except OSError as e:
        msg = f"{value}: {e.strerror}"
        raise ValueError(msg) from e


def mode_later(value: str) -> int:
    """The mode of a file that may be made later, 0 then. Raises ValueError where it can never be made or used."""
    try:
        mode = Path(value).stat().st_mode
        permitted = stat.S_ISDIR(mode) or os.access(value, os.R_OK | (os.W_OK if stat.S_ISSOCK(mode) else 0))
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as e:
        msg = f"{value}: {why(e)}"
        raise ValueError(msg) from e
    if not permitted:
        msg = f"{value}: {os.strerror(errno.EACCES)}"
        raise ValueError(msg)
    return mode


def why(error: Exception) -> str:
    """Why a file cannot be used, without its name."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
