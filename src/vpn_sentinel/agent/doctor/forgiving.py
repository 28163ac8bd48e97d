"""Settings read to the end: each one that cannot be used is noted, and the rest counts as if it were not set."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from vpn_sentinel.agent.geo.settings import GeoSettings
from vpn_sentinel.agent.remedies.settings import ReactionSettings
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.runtime.idle import AGENT, idle
from vpn_sentinel.runtime.settings import PREFIX, UNPREFIXED, SettingError, Source

T = TypeVar("T")
_NOBODY: Final = "http://127.0.0.1:9"  # port 9, discard: stands for an address that is missing or may not be used
_URL: Final = PREFIX + "URL"


@dataclass
class Forgiving(Source):
    """A source that answers a setting it cannot parse with the default. `troubles` are the messages, by setting."""

    troubles: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str | None] = field(default_factory=dict)

    def raw(self, name: str) -> str | None:
        if name in self.hidden:
            self.asked.add(name)
            return self.hidden[name]
        try:
            return super().raw(name)
        except SettingError as e:  # a NAME_FILE that cannot be read
            self.troubles.setdefault(e.name, str(e))
            return None

    def get(self, name: str, parse: Callable[[str], T], default: T) -> T:
        try:
            return super().get(name, parse, default)
        except SettingError as e:
            self.troubles.setdefault(e.name, str(e))
            return default

    def until_read(self, read: Callable[[Source], T]) -> T:
        """Read a role's settings; what stops it is noted and hidden, and it is read once more."""
        for _ in range(20):
            try:
                return read(self)
            except SettingError as e:
                again = e.name in self.troubles
                self.troubles.setdefault(e.name, str(e))
                self._hide(e.name, whole_family=again)
        msg = "settings that stay unusable when they are not set"
        raise RuntimeError(msg)

    def _hide(self, key: str, *, whole_family: bool) -> None:
        name = key if key in UNPREFIXED else key.removeprefix(PREFIX)
        self.hidden[name] = _NOBODY if key == _URL else None
        if whole_family:  # such as a password without its user: neither is used
            family = name.partition("_")[0] + "_"
            self.hidden.update(dict.fromkeys((n for n in self.asked if n.startswith(family)), None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """`urls` are the server's addresses that may be used. `troubles`, and `idle` for what does nothing, are one line
    each.
    """

    agent: AgentSettings
    reactions: ReactionSettings
    urls: tuple[str, ...]
    troubles: tuple[str, ...]
    idle: tuple[str, ...]
    asked: frozenset[str]


def read_all(source: Source, hostname: str | None = None) -> Read:
    """Everything that an agent would read here, and `geo`."""
    forgiving = Forgiving(env=source.env, file=source.file, flags=source.flags)
    agent = forgiving.until_read(lambda s: AgentSettings.read(s, hostname=hostname))
    forgiving.until_read(GeoSettings.read)
    reactions = forgiving.until_read(ReactionSettings.read)
    source.asked |= forgiving.asked
    missing = forgiving.hidden.get("URL") == _NOBODY
    # That no server is set at all has a line of its own.
    if missing and Source.raw(source, "URL") is None:
        forgiving.troubles.pop(_URL, None)
    return Read(
        agent=agent,
        reactions=reactions,
        urls=() if missing else agent.urls,
        troubles=tuple(forgiving.troubles.values()),
        idle=idle(forgiving, *AGENT),
        asked=frozenset(forgiving.asked),
    )
