"""Reading settings: file, then environment, then flags; the later one wins, and every error names the key.

A role (agent, server) declares its settings as a frozen dataclass and fills it from one `Source`. Whatever the
source holds and nobody asked for is reported by `Source.unread`, so a mistyped name does not pass in silence.
"""

import errno
import ipaddress
import os
import select
import ssl
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from vpn_sentinel.runtime.addresses import parse_address, parse_network
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.unusable import Unusable
from vpn_sentinel.runtime.urls import address_of, is_host

T = TypeVar("T")
PREFIX: Final = "VPN_SENTINEL_"
# Of the replaced system and of Docker: these carry no prefix.
UNPREFIXED: Final = frozenset({"TELEGRAM_BOT_TOKEN", "TELEGRAM_CHAT_ID", "TZ"})

# A command line, which has quotes of its own, and what the system reads as it stands.
_QUOTES_THEMSELVES: Final = frozenset({"HOOK", "TZ"})

# The data folder of a user that has no home: VPN_SENTINEL_DATA_DIR must name one.
HOMELESS: Final = "/nonexistent/vpn-sentinel"

_LARGEST: Final = 65_536  # bytes of a file that holds one setting
_PIPE_WITHIN: Final = 5.0  # seconds

# ISO 3166-1 alpha-2, as of 2024, and XK, which the databases of places use for Kosovo.
_COUNTRIES: Final = """
    AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ
    CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR
    GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT
    JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO
    MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY
    QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO
    TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS XK YE YT ZA ZM ZW
    """
_MEANT: Final = {"UK": "GB", "EN": "GB", "EL": "GR", "SP": "ES", "JA": "JP", "DA": "DK", "CS": "CZ"}

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# What no packet of a home comes from on the internet: this host, a link, a group, or an IPv4 address in another form.
_NO_HOME: Final[tuple[IPNetwork, ...]] = tuple(
    ipaddress.ip_network(block)
    for block in (
        *("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4"),
        *("::/96", "64:ff9b::/96", "fe80::/10", "ff00::/8"),
    )
)


class SettingError(Unusable):
    """A setting that cannot be used. The message is one line that names the setting and what it takes."""

    def __init__(self, name: str, problem: str) -> None:
        # A path may hold a line end, and what is no text; a line it is all the same.
        told = f"{name}: {problem}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in told))
        self.name = name


@dataclass
class Source:
    """Where values come from. Names are the environment's; `API_KEY` stands for `VPN_SENTINEL_API_KEY`.

    A TOML file uses the same names, in lower case or not: `api_key = "…"`. `NAME_FILE` in the environment names a file
    that holds the value, for Docker secrets.
    """

    env: Mapping[str, str]
    file: Mapping[str, object] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    @classmethod
    def load(cls, env: Mapping[str, str], flags: Mapping[str, str | None], path: str | None = None) -> "Source":
        """Build a source; `path` is a TOML file. Raises SettingError when the file cannot be read or parsed."""
        path = path or unquoted(env.get(PREFIX + "CONFIG", ""))
        values: Mapping[str, object] = {}
        if path:
            values = from_toml(path, f"configuration file {path}")
            # Passed over, a table would take all that is in it along: the key, and who may ask.
            if table := next((k for k, v in values.items() if isinstance(v, dict)), None):
                raise SettingError(f"configuration file {path}", f"[{table}] is a table; settings stand at the top")
            lower = [k.lower() for k in values]
            if twice := sorted({k for k in lower if lower.count(k) > 1}):
                raise SettingError(f"configuration file {path}", f"sets {', '.join(twice)} twice, in different cases")
        given = {k: v for k, v in flags.items() if v is not None}
        return cls(env=env, file={k.lower(): v for k, v in values.items()}, flags=given)

    def raw(self, name: str) -> str | None:
        """The value of `name` as text, or None when nobody set it. An empty value counts as not set."""
        self.asked.add(name)
        key = name if name in UNPREFIXED else PREFIX + name
        if value := self.flags.get(name):
            return value
        said = self.env.get(key, "").strip()
        if value := said if name in _QUOTES_THEMSELVES else unquoted(said):
            return value
        if path := unquoted(self.env.get(key + "_FILE", "")):
            try:
                return _held_in(path).strip() or None
            except (OSError, ValueError) as e:
                raise SettingError(f"{key}_FILE", f"{path}: {why(e)}") from e
        value_in_file = self.file.get(name.lower())
        try:
            match value_in_file:
                case None:
                    return None
                case bool():
                    return "true" if value_in_file else "false"
                case str() | int() | float():
                    return str(value_in_file).strip() or None
                case list():
                    return ",".join(str(item) for item in value_in_file) or None
        except ValueError as e:  # a number in hexadecimal has no bound, and one that is written has
            raise SettingError(name.lower(), "is too long a number") from e
        raise SettingError(name.lower(), "takes a text, a number, true, false or a list")

    def get(self, name: str, parse: Callable[[str], T], default: T) -> T:
        """Parse `name`, or return `default`. Raises SettingError naming the key when `parse` raises ValueError."""
        text = self.raw(name)
        if text is None:
            return default
        try:
            return parse(text)
        except ValueError as e:
            key = name if name in UNPREFIXED else PREFIX + name
            raise SettingError(key, str(e)) from e

    def unread(self) -> list[str]:
        """Names set in the environment or the file that nobody asked for: probably misspelt."""
        keys = {PREFIX + name for name in self.asked - UNPREFIXED}
        plain = keys | {key + "_FILE" for key in keys}
        in_env = [k for k in self.env if k.startswith(PREFIX) and k not in plain and k != PREFIX + "CONFIG"]
        # The system reads its own variable in the environment alone.
        in_file = [k for k in self.file if k.upper() not in self.asked - {"TZ"}]
        return sorted(in_env + in_file)


def from_toml(path: str, what: str) -> dict[str, object]:
    """What a TOML file holds. Raises SettingError, by the name `what`, when it cannot be read or parsed."""
    import tomllib  # a tenth of a megabyte, where somebody keeps settings in a file

    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except RecursionError as e:
        raise SettingError(what, "is nested too deep") from e
    except (OSError, ValueError) as e:  # of the disk, of UTF-8, of TOML, and of int() for too many digits
        raise SettingError(what, why(e)) from e


def _held_in(path: str) -> str:
    """The text of a small file, without the mark that some editors put in front. A pipe is waited for, not for ever.

    Raises OSError, and ValueError for what is no text.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            if not select.select([file], [], [], _PIPE_WITHIN)[0]:
                msg = "is a pipe that nobody writes into"
                raise ValueError(msg)
            os.set_blocking(file.fileno(), True)
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        msg = f"holds more than {_LARGEST} bytes"
        raise ValueError(msg)
    found = content.decode("utf-8-sig")
    if any(not (c.isprintable() or c.isspace()) for c in found):
        msg = "holds a character that no setting takes"
        raise ValueError(msg)
    return found


def why(error: Exception) -> str:
    """What keeps a file from being used, in words and without its name."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def environment() -> Mapping[str, str]:
    """The process's environment: the one place that reads it."""
    return os.environ  # noqa: TID251


def default_data_dir() -> str:
    """Where state is kept when nobody says: the system's for root, else the user's (XDG base directories).

    A user without a home (`docker run --user 12345`) has none: what stands here then cannot be made, and says so.
    """
    if os.geteuid() == 0:
        return "/var/lib/vpn-sentinel"
    try:
        return str(Path.home() / ".local/state/vpn-sentinel")
    except (RuntimeError, KeyError):  # neither HOME nor an entry in passwd(5)
        return HOMELESS


def unquoted(value: str) -> str:
    """Without the one pair of quotes that stands around all of it, and the spaces around and in that.

    Docker hands quotes of an env file, and of a list in a compose file, over as they stand. Of two pairs one is left.
    """
    found = value.strip()
    if len(found) > 1 and found[0] in "\"'" and found.find(found[0], 1) == len(found) - 1:
        return found[1:-1].strip()
    return found


def text(value: str) -> str:
    return value


def secret(value: str) -> Secret:
    """One line of printable characters."""
    if not value.isprintable():
        msg = "takes one line of printable characters"
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
    """What commas separate: paths, which may hold spaces."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


def listed(value: str) -> tuple[str, ...]:
    """What commas, spaces or line ends separate: all that holds none of them itself."""
    return tuple(value.replace(",", " ").split())


def url(value: str, *, login: str = "takes no login (what stands before an @)") -> str:
    """A base address, http or https, without its trailing slash and without a login, which nobody would send.

    `login` is what is said of one: where it belongs, say.
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
    """An IPv6 address as it stands in a URL, and as it is."""
    return value[1:-1] if value.startswith("[") and value.endswith("]") and ":" in value else value


def path(value: str) -> str:
    """What stands before every route: with a slash in front and none at the end."""
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
        msg = f"address {number} of {of} {e}"  # itself it may hold a login
        raise ValueError(msg) from e


def networks(value: str) -> tuple[IPNetwork, ...]:
    """Addresses and CIDR blocks, separated by commas or spaces."""
    return tuple(parse_network(_without_brackets(part)) for part in listed(value))


def home_networks(value: str) -> tuple[IPNetwork, ...]:
    """The same, of a home: ValueError for what nothing on the internet ever comes from, and would match no leak."""
    found = networks(value)
    for network in found:
        if any(network.version == no.version and network.subnet_of(no) for no in _NO_HOME):  # type: ignore[arg-type]
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
            meant = f": {_MEANT[code]} is meant?" if code in _MEANT else ""
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
    """The mode of a file (inode(7)), 0 for what is not there or may not be looked at."""
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):
        return 0


def authorities(value: str) -> Path:
    """A file of certificates, PEM, that OpenSSL takes."""
    path = readable_file(value)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as e:  # ssl.SSLError is one
        msg = f"{value} holds no certificates that can be used (PEM)"
        raise ValueError(msg) from e
    return path


def readable_file(value: str) -> Path:
    """A regular file: to open a pipe would wait for whoever writes it."""
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
    """The mode of a file that may not be there yet, 0 then. Raises ValueError where it can neither come nor be used."""
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
