"""The table of settings: it says what each command reads, and what is said of a name that none of them knows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from vpn_sentinel.agent.geo.settings import GeoSettings
from vpn_sentinel.agent.settings import AgentSettings, ProbeSettings
from vpn_sentinel.cli.settings import every_setting, settings_of, unknown
from vpn_sentinel.runtime.settings import Source
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.wire.settings import TZ

READERS: dict[str, Callable[[Source], object]] = {
    "server": ServerSettings.read,
    "agent": AgentSettings.read,
    "check": ProbeSettings.read,
    "geo": GeoSettings.read,
}


@dataclass
class Recording(Source):
    names: set[str] = field(default_factory=set)

    def raw(self, name: str, *, verbatim: bool = False) -> str | None:
        self.names.add(name)
        return super().raw(name, verbatim=verbatim)


@pytest.mark.parametrize("reader", READERS)
def test_a_command_reads_what_the_table_says(reader: str) -> None:
    source = Recording(env={"VPN_SENTINEL_URL": "https://sentinel.example"})
    READERS[reader](source)
    # Every command looks at the zone when it tells of unknown names.
    assert source.names | {TZ.name} == {name for setting in settings_of(reader) for name in setting.names}


def test_the_table_knows_no_other_reader() -> None:
    assert {reader for setting in every_setting() for reader in setting.read_by} == READERS.keys()


@pytest.mark.parametrize("reader", READERS)
def test_a_name_means_one_thing_to_a_command(reader: str) -> None:
    names = [name for setting in settings_of(reader) for name in setting.names]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("reader", READERS)
def test_each_of_a_pair_names_the_other(reader: str) -> None:
    pairs = {setting.name: setting.pair for setting in settings_of(reader) if setting.pair}
    assert {pair: name for name, pair in pairs.items()} == pairs


def test_every_setting_says_what_it_takes() -> None:
    assert [setting.key for setting in every_setting() if not setting.takes.strip()] == []


HINTS: dict[str, tuple[dict[str, str], dict[str, Any], list[str]]] = {
    "nearly a name": (
        {"VPN_SENTINEL_HOME_NETWORK": "x"},
        {},
        ["VPN_SENTINEL_HOME_NETWORK: no such setting; is VPN_SENTINEL_HOME_NETWORKS meant?"],
    ),
    "another command's": ({"VPN_SENTINEL_SERVER_API_PORT": "5000", "VPN_SENTINEL_MAXMIND_KEY_FILE": "/k"}, {}, []),
    "nearly another command's": (
        {"VPN_SENTINEL_SERVER_PORT": "5000"},
        {},
        ["VPN_SENTINEL_SERVER_PORT: no such setting; is VPN_SENTINEL_SERVER_API_PORT meant?"],
    ),
    "one that has no prefix": (
        {"VPN_SENTINEL_TELEGRAM_CHAT_ID": "7"},
        {},
        ["VPN_SENTINEL_TELEGRAM_CHAT_ID: no such setting; is TELEGRAM_CHAT_ID meant?"],
    ),
    "like no other": ({"VPN_SENTINEL_XYZZY": "1"}, {}, ["VPN_SENTINEL_XYZZY: no such setting; is it misspelt?"]),
    "in the file": ({}, {"intervall": 30}, ["intervall: no such setting; is interval meant?"]),
    "the environment's alone": ({}, {"tz": "Asia/Tokyo"}, ["tz: can be set in the environment only"]),
}


@pytest.mark.parametrize(("env", "file", "said"), HINTS.values(), ids=HINTS.keys())
def test_an_unknown_name_is_told_with_the_one_that_it_resembles(
    env: dict[str, str], file: dict[str, Any], said: list[str]
) -> None:
    assert unknown(Source(env=env, file=file), "agent") == said
