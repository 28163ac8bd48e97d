"""All settings of an agent, read without stopping at the first error: one that cannot be used counts as not set."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from vpn_sentinel.agent.geo.settings import SECTIONS, GeoSettings
from vpn_sentinel.agent.remedies.settings import ReactionSettings
from vpn_sentinel.agent.settings import URL, AgentSettings
from vpn_sentinel.runtime.idle import idle
from vpn_sentinel.runtime.settings import Setting, SettingError, Source

T = TypeVar("T")
_SETTINGS: Final = tuple(setting for section in SECTIONS for setting in section.settings)
_BY_KEY: Final = {setting.key: setting for setting in _SETTINGS}


@dataclass
class LenientSource(Source):
    """A source that returns the default for a setting it cannot parse. `troubles` are the error messages, by setting.

    `left_out` are the names of settings that count as not set, each with the value used instead.
    """

    troubles: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str | None] = field(default_factory=dict)

    def raw(self, name: str, *, verbatim: bool = False) -> str | None:
        if name in self.left_out:
            return self.left_out[name]
        try:
            return super().raw(name, verbatim=verbatim)
        except SettingError as e:  # a NAME_FILE that cannot be read
            self.troubles.setdefault(e.name, str(e))
            return None

    def _parsed(self, name: str, setting: Setting[T]) -> T | None:
        try:
            return super()._parsed(name, setting)
        except SettingError as e:
            self.troubles.setdefault(e.name, str(e))
            return None

    def until_read(self, read: Callable[[Source], T]) -> T:
        """Read a role's settings. Where several contradict each other, the one at fault is noted and left out."""
        for _ in _SETTINGS:
            try:
                return read(self)
            except SettingError as e:
                self.troubles.setdefault(e.name, str(e))
                self._leave_out(_BY_KEY[e.name])
        msg = "settings that stay unusable when they are not set"
        raise RuntimeError(msg)

    def _leave_out(self, setting: Setting[object]) -> None:
        self.left_out[setting.name] = setting.stand_in or None
        if setting.pair:  # such as a password without its user: neither is used
            self.left_out[setting.pair] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorSettings:
    """`urls` are the server's addresses that may be used. `troubles` are errors, `idle` settings without effect, one
    line each.
    """

    agent: AgentSettings
    reactions: ReactionSettings
    urls: tuple[str, ...]
    troubles: tuple[str, ...]
    idle: tuple[str, ...]


def read_all(source: Source, hostname: str | None = None) -> DoctorSettings:
    """Everything that an agent would read here, and `geo`."""
    lenient = LenientSource(env=source.env, file=source.file, flags=source.flags)
    agent = lenient.until_read(lambda s: AgentSettings.read(s, hostname=hostname))
    lenient.until_read(GeoSettings.read)
    reactions = lenient.until_read(ReactionSettings.read)
    missing = URL.name in lenient.left_out
    # The check of the server reports that none is set at all.
    if missing and Source.text(source, URL) is None:
        lenient.troubles.pop(URL.key, None)
    return DoctorSettings(
        agent=agent,
        reactions=reactions,
        urls=() if missing else agent.urls,
        troubles=tuple(lenient.troubles.values()),
        idle=idle(lenient, [setting for setting in _SETTINGS if "agent" in setting.read_by]),
    )
