"""Settings: how one is declared, and where its value comes from.

A role (agent, server) declares each setting once, as a field of a frozen dataclass, and fills that from one `Source`.
The settings that a command reads, unknown names, settings without effect (`runtime.idle`), the values that `doctor`
goes on with, and the page of settings all follow from the declarations.
"""

import os
import select
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from vpn_sentinel.runtime.parsers import why
from vpn_sentinel.runtime.user_error import UserError

if TYPE_CHECKING:
    from typing import TypedDict, Unpack

    from _typeshed import DataclassInstance

    D = TypeVar("D", bound=DataclassInstance)

    class _Options(TypedDict, total=False):
        """The optional parts of a declaration: see `Setting`."""

        read_by: tuple[str, ...]
        old_names: tuple[str, ...]
        default_text: str
        pair: str
        idle: "tuple[Idle, ...]"
        stand_in: str
        verbatim: bool
        env_only: bool


T = TypeVar("T")
PREFIX: Final = "VPN_SENTINEL_"
# Names of the replaced system and of Docker, without the prefix.
UNPREFIXED: Final = frozenset({"TELEGRAM_BOT_TOKEN", "TELEGRAM_CHAT_ID", "TZ"})

# The data folder of a user without a home, which cannot be made: VPN_SENTINEL_DATA_DIR must name one.
NO_HOME_DATA_DIR: Final = "/nonexistent/vpn-sentinel"

_MAX_SETTING_FILE_BYTES: Final = 65_536  # of a file with one setting
_PIPE_TIMEOUT_S: Final = 5.0
_SETTING: Final = "setting"  # a key of a field's metadata


def key_of(name: str) -> str:
    """The name of a setting in the environment."""
    return name if name in UNPREFIXED else PREFIX + name


class SettingError(UserError):
    """A setting that cannot be used. The message is one line that names the setting and what it takes."""

    def __init__(self, name: str, problem: str) -> None:
        # A path may contain line ends and bytes that are not text; the message must be one line.
        text = f"{name}: {problem}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
        self.name = name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Idle:
    """When a setting has no effect: unless one of `needs` is set, or while the setting `disabled_by` has a value for
    which `disables` is true.

    Settings are named as in `Setting`. Messages show `shown` instead of a value that may hold a password.
    """

    needs: tuple[str, ...] = ()
    disabled_by: str = ""
    disables: Callable[[str], bool] = lambda _: False
    shown: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Setting(Generic[T]):
    """One setting. `name` is the environment's without its prefix; `old_names` are accepted too, and `name` wins.

    `parse` raises ValueError. `takes` is its text on the page of settings, and `default_text` is shown there instead of
    a `default` that would not be clear. `read_by` are the commands that read it: server, agent, check, geo. `pair` is
    the setting without which this one is refused. `stand_in` is the value that `doctor` uses where this one is needed
    and is missing or refused. A `verbatim` value keeps the quotes around it. One that is `env_only` cannot be set in
    the TOML file.
    """

    name: str
    parse: Callable[[str], T]
    default: T
    takes: str
    read_by: tuple[str, ...] = ()
    old_names: tuple[str, ...] = ()
    default_text: str = ""
    pair: str = ""
    idle: tuple[Idle, ...] = ()
    stand_in: str = ""
    verbatim: bool = False
    env_only: bool = False

    @property
    def key(self) -> str:
        """Its name in the environment."""
        return key_of(self.name)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that it accepts, in order of precedence."""
        return (self.name, *self.old_names)


def of(setting: Setting[T]) -> T:
    """A field of a frozen dataclass that `fill` fills with the setting's value; typed as that value."""
    made: Any = field(default=setting.default, metadata={_SETTING: setting})
    return cast("T", made)


class Section:
    """Settings of one section of the page, in the order in which they are added.

    `read_by` are the commands that read them, unless a setting names others.
    """

    def __init__(self, title: str, about: str = "", *, read_by: tuple[str, ...]) -> None:
        self.title = title
        self.about = about
        self.settings: list[Setting[Any]] = []
        self._read_by = read_by

    def add(
        self, name: str, parse: Callable[[str], T], default: T, takes: str, **options: "Unpack[_Options]"
    ) -> Setting[T]:
        """Declare a setting; see `Setting`."""
        options.setdefault("read_by", self._read_by)
        setting = Setting(name=name, parse=parse, default=default, takes=takes, **options)
        self.settings.append(setting)
        return setting

    def field(self, name: str, parse: Callable[[str], T], default: T, takes: str, **options: "Unpack[_Options]") -> T:
        """Declare a setting as a field of a frozen dataclass: see `of`."""
        return of(self.add(name, parse, default, takes, **options))


@dataclass
class Source:
    """Where values come from. Names are the environment's; `API_KEY` means `VPN_SENTINEL_API_KEY`.

    A TOML file uses the same names, in lower case or not: `api_key = "…"`. `NAME_FILE` in the environment names a file
    that holds the value, for Docker secrets.
    """

    env: Mapping[str, str]
    file: Mapping[str, object] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, env: Mapping[str, str], flags: Mapping[str, str | None], path: str | None = None) -> "Source":
        """Build a source; `path` is a TOML file. Raises SettingError when the file cannot be read or parsed."""
        path = path or unquoted(env.get(PREFIX + "CONFIG", ""))
        values: Mapping[str, object] = {}
        if path:
            values = from_toml(path, f"configuration file {path}")
            # If a table were ignored, so would all settings in it, such as the key.
            if table := next((k for k, v in values.items() if isinstance(v, dict)), None):
                raise SettingError(f"configuration file {path}", f"[{table}] is a table; settings stand at the top")
            lower = [k.lower() for k in values]
            if twice := sorted({k for k in lower if lower.count(k) > 1}):
                raise SettingError(f"configuration file {path}", f"sets {', '.join(twice)} twice, in different cases")
        given = {k: v for k, v in flags.items() if v is not None}
        return cls(env=env, file={k.lower(): v for k, v in values.items()}, flags=given)

    def get(self, setting: Setting[T]) -> T:
        """Its value, or its default. Raises SettingError that names the key that cannot be used.

        Where it is set under several names each value is checked, and the first name's counts.
        """
        found = [value for name in setting.names if (value := self._parsed(name, setting)) is not None]
        return found[0] if found else setting.default

    def text(self, setting: Setting[Any]) -> str | None:
        """Its value as it is written, or None when it is not set. Raises SettingError."""
        texts = (self.raw(name, verbatim=setting.verbatim) for name in setting.names)
        return next((text for text in texts if text is not None), None)

    def _parsed(self, name: str, setting: Setting[T]) -> T | None:
        text = self.raw(name, verbatim=setting.verbatim)
        if text is None:
            return None
        try:
            return setting.parse(text)
        except ValueError as e:
            raise SettingError(key_of(name), str(e)) from e

    def raw(self, name: str, *, verbatim: bool = False) -> str | None:
        """The text under one name, or None when it is not set. An empty value counts as not set."""
        key = key_of(name)
        if value := self.flags.get(name):
            return value
        value_text = self.env.get(key, "").strip()
        if value := value_text if verbatim else unquoted(value_text):
            return value
        if path := unquoted(self.env.get(key + "_FILE", "")):
            try:
                return _read_small_file(path).strip() or None
            except (OSError, ValueError) as e:
                raise SettingError(f"{key}_FILE", f"{path}: {why(e)}") from e
        return self._in_file(name.lower())

    def _in_file(self, name: str) -> str | None:
        value = self.file.get(name)
        try:
            match value:
                case None:
                    return None
                case bool():
                    return "true" if value else "false"
                case str() | int() | float():
                    return str(value).strip() or None
                case list():
                    return ",".join(str(item) for item in value) or None
        except ValueError as e:  # int() accepts a hexadecimal number of any length, str() limits its digits
            raise SettingError(name, "is too long a number") from e
        raise SettingError(name, "takes a text, a number, true, false or a list")

    def unknown(self, known: Iterable[Setting[Any]]) -> list[str]:
        """Names set in the environment or the file that are none of `known`: probably misspelt."""
        in_env, in_file = {PREFIX + "CONFIG"}, set()
        for setting in known:
            for name in setting.names:
                in_env |= {key_of(name), key_of(name) + "_FILE"}
                if not setting.env_only:
                    in_file.add(name.lower())
        return sorted(
            [key for key in self.env if key.startswith(PREFIX) and key not in in_env]
            + [key for key in self.file if key not in in_file]
        )


def fill(cls: "type[D]", source: Source, **others: Any) -> "D":
    """A `cls` whose fields made by `of` are read from `source`, and whose others are `others`. Raises SettingError."""
    read = {part.name: source.get(part.metadata[_SETTING]) for part in fields(cls) if _SETTING in part.metadata}
    return cls(**read, **others)


def from_toml(path: str, what: str) -> dict[str, object]:
    """The content of a TOML file. Raises SettingError, by the name `what`, when it cannot be read or parsed."""
    import tomllib  # it takes 0.1 MB, so only where there is a file

    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except RecursionError as e:
        raise SettingError(what, "is nested too deep") from e
    except (OSError, ValueError) as e:  # from the disk, UTF-8, TOML, or int() with too many digits
        raise SettingError(what, why(e)) from e


def _read_small_file(path: str) -> str:
    """The text of a small file, without a byte order mark. The wait for a pipe is limited.

    Raises OSError, and ValueError for what is not text.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            if not select.select([file], [], [], _PIPE_TIMEOUT_S)[0]:
                msg = "is a pipe that nobody writes into"
                raise ValueError(msg)
            os.set_blocking(file.fileno(), True)
        content = file.read(_MAX_SETTING_FILE_BYTES + 1)
    if len(content) > _MAX_SETTING_FILE_BYTES:
        msg = f"holds more than {_MAX_SETTING_FILE_BYTES} bytes"
        raise ValueError(msg)
    found = content.decode("utf-8-sig")
    if any(not (c.isprintable() or c.isspace()) for c in found):
        msg = "holds a character that no setting takes"
        raise ValueError(msg)
    return found


def environment() -> Mapping[str, str]:
    """The process's environment: only this function reads it."""
    return os.environ  # noqa: TID251


def default_data_dir() -> str:
    """The data folder by default: the system's for root, else the user's (XDG base directories).

    For a user without a home (`docker run --user 12345`) it is `NO_HOME_DATA_DIR`, which cannot be made.
    """
    if os.geteuid() == 0:
        return "/var/lib/vpn-sentinel"
    try:
        return str(Path.home() / ".local/state/vpn-sentinel")
    except (RuntimeError, KeyError):  # neither HOME nor an entry in passwd(5)
        return NO_HOME_DATA_DIR


def unquoted(value: str) -> str:
    """Without one pair of quotes around the whole text, and without spaces around and inside them.

    Docker passes quotes of an env file, and of a list in a compose file, on unchanged. Of two pairs, one stays.
    """
    found = value.strip()
    if len(found) > 1 and found[0] in "\"'" and found.find(found[0], 1) == len(found) - 1:
        return found[1:-1].strip()
    return found
