"""Databases in use: which count, and how a new one takes the place of the old while somebody looks up."""

import gc
import logging
import os
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.agent.geo.test_update import fetch
from tests.agent.geo.world import DAY, NOW, Server, mmdb, serving
from tests.conftest import ManualClock
from vpn_sentinel.agent.geo.databases import CHECK_FILES_EVERY_S, Databases
from vpn_sentinel.agent.geo.sources import dbip, from_files

EXIT, EXIT6 = ip_address("185.65.134.10"), ip_address("2a03:1b20:3::10")


def held(folder: Path) -> int:
    """How many files of `folder` this process has open or mapped."""
    opened = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            opened.append(str(fd.readlink()))
    return sum(str(folder) in line for line in [*opened, *Path("/proc/self/maps").read_text().splitlines()])


def countries(databases: Databases) -> list[str | None]:
    return [p.country for p in databases.look_up(EXIT)]


def test_a_new_file_is_taken_without_a_restart_and_the_old_is_let_go(tmp_path: Path, clock: ManualClock) -> None:
    folder = tmp_path / "geo"
    databases = Databases(clock, folder=folder)
    assert countries(databases) == []
    for n in range(12):
        country = ("NL", "SE", "CH")[n % 3]
        mmdb(tmp_path / "x.mmdb", "both", country=country, built=NOW - 20 * DAY + n)
        fetch(from_files((tmp_path / "x.mmdb",)), folder, clock)
        databases.look_up(EXIT)
        clock.now += CHECK_FILES_EVERY_S
        assert countries(databases) == [country]
        gc.collect()
        assert held(folder) == 1
    databases.close()
    assert held(folder) == 0


def test_an_update_between_two_questions_disturbs_neither(tmp_path: Path, clock: ManualClock) -> None:
    with serving() as server:
        server.dbip(tmp_path, "2026-12", country="DE", built=NOW - 40 * DAY)
        fetch(dbip(server.base), tmp_path / "geo", clock)
        databases = Databases(clock, folder=tmp_path / "geo")
        assert countries(databases) == ["DE"]
        _renew(server, tmp_path, clock)
        assert countries(databases) == ["DE"]  # the old file is gone from the folder, and still open
        clock.now += CHECK_FILES_EVERY_S
        assert countries(databases) == ["NL"]
        databases.close()


def _renew(server: Server, folder: Path, clock: ManualClock) -> None:
    server.dbip(folder)
    fetch(dbip(server.base), folder / "geo", clock)


def test_files_put_there_by_hand_count_without_a_manifest(tmp_path: Path, clock: ManualClock) -> None:
    mmdb(tmp_path / "GeoLite2-City.mmdb", "GeoLite2-City")
    mmdb(tmp_path / "GeoLite2-ASN.mmdb", "GeoLite2-ASN")
    mmdb(tmp_path / "mine.mmdb", "Mine", country="SE")
    databases = Databases(clock, folder=tmp_path)
    assert [(p.source, p.country, p.asn) for p in databases.look_up(EXIT)] == [
        ("maxmind:2027-01-10", "NL", 39351),
        ("mmdb:mine:2027-01-10", "SE", None),
    ]
    databases.close()


def test_files_that_are_named_win_over_the_folder(tmp_path: Path, clock: ManualClock) -> None:
    mmdb(tmp_path / "in-folder.mmdb", "Mine")
    (tmp_path / "else").mkdir()
    mmdb(tmp_path / "else" / "named.mmdb", "Named", country="SE")
    databases = Databases(clock, files=[str(tmp_path / "else" / "named.mmdb")], folder=tmp_path)
    assert countries(databases) == ["SE"]
    mmdb(tmp_path / "new.mmdb", "Named", country="CH")
    (tmp_path / "new.mmdb").replace(tmp_path / "else" / "named.mmdb")
    clock.now += CHECK_FILES_EVERY_S
    assert countries(databases) == ["CH"]
    databases.close()


def test_what_cannot_be_opened_is_told_once_and_the_old_stays(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.mmdb"
    mmdb(path, "Mine")
    databases = Databases(clock, files=[str(path)])
    path.unlink()
    for _ in range(5):
        clock.now += CHECK_FILES_EVERY_S
        assert countries(databases) == ["NL"]
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == [
        "a database of places cannot be used"
    ]
    mmdb(path, "Mine", country="SE")
    clock.now += CHECK_FILES_EVERY_S
    assert countries(databases) == ["SE"]
    databases.close()


def test_a_damaged_stretch_is_no_answer_and_no_crash(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.mmdb"
    good = mmdb(path, "Mine", version=4)
    end = good.rfind(b"\xab\xcd\xefMaxMind.com")
    start = good.index(b"\0" * 16) + 16  # behind the tree
    path.write_bytes(good[:start] + b"\xff" * (end - start) + good[end:])
    databases = Databases(clock, files=[str(path)])
    for _ in range(3):
        assert databases.look_up(EXIT) == ()
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    databases.close()


def test_a_file_whose_version_is_a_text_cannot_be_used(tmp_path: Path, clock: ManualClock) -> None:
    file = tmp_path / "x.mmdb"
    good = mmdb(file, "both")
    file.write_bytes(good.replace(b"ip_version\xa1\x06", b"ip_version\x416"))
    assert file.read_bytes() != good
    with pytest.raises(ValueError, match="is not a MaxMind database file"):
        Databases(clock, files=[str(file)])


def test_a_file_that_is_cut_while_it_is_in_use_is_no_crash(tmp_path: Path, clock: ManualClock) -> None:
    path = tmp_path / "x.mmdb"
    good = mmdb(path, "Mine")
    databases = Databases(clock, files=[str(path)])
    for size in range(0, len(good), max(1, len(good) // 40)):
        os.truncate(path, size)
        databases.look_up(EXIT)
    path.write_bytes(good)
    clock.now += CHECK_FILES_EVERY_S
    assert countries(databases) == ["NL"]
    databases.close()


def test_an_address_of_a_family_that_the_file_does_not_hold(tmp_path: Path, clock: ManualClock) -> None:
    mmdb(tmp_path / "four.mmdb", "Mine", version=4)
    databases = Databases(clock, folder=tmp_path)
    assert databases.look_up(EXIT6) == ()
    assert len(databases.look_up(EXIT)) == 1
    databases.close()


@pytest.mark.parametrize(("days", "words"), [(44, []), (46, ["old"]), (91, ["much too old"])])
def test_age_is_logged_once(
    days: int, words: list[str], tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mmdb(tmp_path / "x.mmdb", "Mine", built=NOW - days * DAY)
    databases = Databases(clock, folder=tmp_path)
    for _ in range(3):
        clock.now += CHECK_FILES_EVERY_S
        databases.look_up(EXIT)
    said = [r.message for r in caplog.records if "vpn-sentinel geo update" in r.message]
    assert [m.split(";")[0].removeprefix("a database of places is ") for m in said] == words
    databases.close()
