"""Settings read to the end, whatever is wrong with them."""

from pathlib import Path

import pytest

from vpn_sentinel.agent.doctor.lenient import read_all
from vpn_sentinel.cli.settings import settings_of
from vpn_sentinel.runtime.settings import Setting, Source


def names(**settings: str) -> list[str]:
    read = read_all(Source({f"VPN_SENTINEL_{k}": v for k, v in settings.items()}), hostname="host")
    return sorted(t.split(":")[0].removeprefix("VPN_SENTINEL_") for t in read.troubles)


def test_nothing_set_is_no_trouble() -> None:
    read = read_all(Source({}), hostname="host")
    assert (read.urls, read.troubles, read.agent.client_id) == ((), (), "host")


def test_every_setting_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    assert names(
        URL="nonsense", INTERVAL="soon", CA_FILE=str(tmp_path / "none"), HOME_NETWORKS="home", API_KEY="käse",
        HEALTH_PORT="99999", EXPECTED_COUNTRIES="Netherlands", MAXMIND_KEY="k", CONTAIN="perhaps", HOOK="relative",
        GLUETUN_USER="me", QBITTORRENT_USER="me", API_PATH="/",
    ) == sorted([
        "URL", "INTERVAL", "CA_FILE", "HOME_NETWORKS", "API_KEY", "HEALTH_PORT", "EXPECTED_COUNTRIES",
        "MAXMIND_ACCOUNT", "CONTAIN", "HOOK", "GLUETUN_USER", "QBITTORRENT_USER", "API_PATH",
    ])  # fmt: skip


def test_the_rest_counts_as_it_is_set() -> None:
    read = read_all(Source({"VPN_SENTINEL_URL": "https://s.example", "VPN_SENTINEL_INTERVAL": "soon"}))
    assert (read.urls, read.agent.interval, len(read.troubles)) == (("https://s.example",), 30.0, 1)


def test_a_password_without_its_user(tmp_path: Path) -> None:
    assert names(GLUETUN_PASSWORD="p", QBITTORRENT_PASSWORD="p") == ["GLUETUN_USER", "QBITTORRENT_USER"]


def test_an_address_that_would_show_the_key_is_not_used() -> None:
    read = read_all(Source({"VPN_SENTINEL_URL": "http://s.example", "VPN_SENTINEL_API_KEY": "k3y"}))
    assert read.urls == ()
    assert [t.split(":")[0] for t in read.troubles] == ["VPN_SENTINEL_URL"]


def test_a_reference_agent_without_its_site() -> None:
    read = read_all(Source({"VPN_SENTINEL_ROLE": "reference", "VPN_SENTINEL_URL": "https://s.example"}))
    assert [t.split(":")[0] for t in read.troubles] == ["VPN_SENTINEL_SITE"]
    assert (read.agent.role, read.urls) == ("reference", ("https://s.example",))


@pytest.mark.parametrize("value", ["x", "\x01", "/none", "http://8.8.8.8", "-1"])
@pytest.mark.parametrize("setting", settings_of("agent", "geo"), ids=lambda s: s.name)
def test_whatever_one_setting_holds_all_are_read(setting: Setting[object], value: str) -> None:
    for env in ({setting.key: value}, {setting.key: value, "VPN_SENTINEL_ROLE": "reference"}):
        read = read_all(Source(env), hostname="host")
        assert all("\n" not in trouble for trouble in read.troubles)


def test_a_secret_file_that_is_missing() -> None:
    assert names(API_KEY_FILE="/nonexistent", URL="https://s.example") == ["API_KEY_FILE"]
