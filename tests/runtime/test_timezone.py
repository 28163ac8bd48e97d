"""TZ as tzset(3) takes it."""

from pathlib import Path

import pytest

from vpn_sentinel.runtime.settings import Source
from vpn_sentinel.runtime.timezone import is_understood
from vpn_sentinel.server.settings import ServerSettings


@pytest.fixture
def zones(tmp_path: Path) -> Path:
    (tmp_path / "Europe").mkdir()
    (tmp_path / "Europe/Madrid").write_bytes(b"TZif2")
    (tmp_path / "localtime").write_bytes(b"TZif2")
    (tmp_path / "text").write_text("no zone")
    return tmp_path


@pytest.mark.parametrize(
    "value", ["", ":", "UTC", "UTC0", "CET-1CEST", "CET-1CEST,M3.5.0,M10.5.0/3", "<+03>-3", ":Europe/Madrid"]
)  # fmt: skip
def test_what_the_system_understands(value: str, zones: Path) -> None:
    assert is_understood(value, zones)


def test_a_file_of_its_own(zones: Path) -> None:
    assert is_understood(f":{zones}/localtime", zones)
    assert not is_understood(f"{zones}/text", zones)


@pytest.mark.parametrize("value", ["Europe/Nowhere", "Madrid", "\x00", ":/nowhere", "1", "Europe"])
def test_what_it_takes_as_utc(value: str, zones: Path) -> None:
    assert not is_understood(value, zones)


@pytest.mark.parametrize("value", [":/etc/localtime", "UTC0", "CET-1CEST", "Europe/Nowhere", "", "\x07"])
def test_no_value_keeps_a_server_from_starting(value: str) -> None:
    assert ServerSettings.read(Source(env={"TZ": value}))
