"""Settings that have no effect with the present values of the others. They are logged at the start, and are no
error.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from vpn_sentinel.runtime.settings import Setting, Source, key_of

_OFF: Final = frozenset({"", "false", "no", "off", "0"})


def is_off(value: str) -> bool:
    """Whether a value turns its setting off."""
    return value.lower() in _OFF


def idle(source: Source, settings: Sequence[Setting[Any]]) -> tuple[str, ...]:
    """A line for each of `settings` that has no effect with the values of the others, which must be among them.

    All have been read before, so reading them raises nothing.
    """
    return tuple(dict.fromkeys(_lines(source, settings)))


def _lines(source: Source, settings: Sequence[Setting[Any]]) -> Iterator[str]:
    by_name = {setting.name: setting for setting in settings}

    def text(name: str) -> str:
        return source.text(by_name[name]) or ""

    for setting in settings:
        if setting.idle and not is_off(text(setting.name)):
            for row in setting.idle:
                if row.needs and all(is_off(text(name)) for name in row.needs):
                    yield f"{setting.key}: does nothing without {' or '.join(map(key_of, row.needs))}"
                if row.disabled_by and (value := text(row.disabled_by)) and row.disables(value):
                    yield f"{setting.key}: does nothing while {key_of(row.disabled_by)}={row.shown or value}"
