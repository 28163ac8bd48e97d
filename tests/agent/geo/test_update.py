"""Fetching databases from servers of the tests' own, and what is left in place when that fails."""

import gzip
import io
import os
import re
import ssl
import stat
import tarfile
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from lab.certs import Authority
from tests.agent.geo.world import DAY, NOW, Server, mmdb, serving
from tests.conftest import ManualClock, small_disk
from vpn_sentinel.agent.geo.databases import Databases
from vpn_sentinel.agent.geo.fetch import Bounds, DownloadLogin, Web
from vpn_sentinel.agent.geo.sources import Vendor, dbip, from_files, maxmind
from vpn_sentinel.agent.geo.store import Collection, Entry, GeoError, Manifest, install, locked, read_manifest, writing
from vpn_sentinel.agent.geo.unpack import only_database
from vpn_sentinel.agent.geo.update import update
from vpn_sentinel.domain.observation import Place
from vpn_sentinel.runtime.secret import Secret

EXIT = ip_address("185.65.134.10")
KEY = "k3y-that-nobody-may-see"
CITY, ASN = "/free/dbip-city-lite-2027-01.mmdb.gz", "/free/dbip-asn-lite-2027-01.mmdb.gz"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "geo"


def web(clock: ManualClock, ca: Path | None = None, **bounds: float) -> Web:
    return Web(ssl.create_default_context(cafile=ca), clock, bounds=Bounds(**bounds))  # type: ignore[arg-type]


def fetch(source: Vendor, folder: Path, clock: ManualClock, **bounds: Any) -> bool:
    return update(source, folder, web(clock, **bounds), clock).changed


def asked(folder: Path, clock: ManualClock) -> tuple[Place, ...]:
    databases = Databases(clock, folder=folder)
    try:
        return databases.look_up(EXIT)
    finally:
        databases.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_city_and_network_become_one_opinion(server: Server, folder: Path, tmp_path: Path, clock: ManualClock) -> None:
    server.dbip(tmp_path)
    assert fetch(dbip(server.base), folder, clock)
    assert asked(folder, clock) == (
        Place(
            ip=EXIT, source="dbip:2027-01-10", country="NL", region="North Holland", city="Amsterdam",
            timezone="Europe/Amsterdam", asn=39351, org="31173 Services AB",
        ),
    )  # fmt: skip
    (collection,) = (read_manifest(folder) or Manifest()).collections
    assert (collection.fetched, collection.licence, "db-ip.com" in collection.credit) == (NOW, "CC BY 4.0", True)
    assert sorted(p.name for p in folder.glob("*.mmdb")) == sorted(e.name for e in collection.files)
    assert not list(folder.glob("*.part"))
    assert {p.stat().st_mode & 0o777 for p in folder.glob("*.mmdb")} == {0o644}


def test_the_newest_is_not_fetched_twice(server: Server, folder: Path, tmp_path: Path, clock: ManualClock) -> None:
    server.dbip(tmp_path)
    assert fetch(dbip(server.base), folder, clock)
    server.got.clear()
    assert not fetch(dbip(server.base), folder, clock)
    assert server.got == []


def test_a_damaged_installed_file_is_fetched_again(
    server: Server, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    server.dbip(tmp_path)
    fetch(dbip(server.base), folder, clock)
    before = contents(folder)
    next(folder.glob("places-*.mmdb")).write_bytes(b"gone bad")
    fetch(dbip(server.base), folder, clock)
    assert server.paths() == [CITY, ASN, CITY]
    assert contents(folder) == before


def test_the_month_before_serves_while_the_new_one_is_not_out(
    server: Server, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    server.dbip(tmp_path, "2026-12")
    assert fetch(dbip(server.base), folder, clock)
    assert server.paths()[:2] == [CITY, CITY.replace("2027-01", "2026-12")]
    assert len(asked(folder, clock)) == 1


def test_no_month_at_all_asks_about_the_clock(server: Server, folder: Path, clock: ManualClock) -> None:
    with pytest.raises(GeoError, match=r"of 2027-01 or 2026-12; is this machine's clock right\?"):
        fetch(dbip(server.base), folder, clock)


def _bomb() -> bytes:
    return gzip.compress(bytes(3_000_000))


def _damaged(good: bytes) -> bytes:
    return good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 0xFF]) + good[len(good) // 2 + 1 :]


SPOILT: dict[str, tuple[Callable[[bytes], bytes | int], str]] = {
    "a web page": (lambda _: b"<html>Log in</html>", "not a gzip file; perhaps a web page"),
    "a web page, packed": (lambda _: gzip.compress(b"<html>Log in</html>"), "not a MaxMind database"),
    "cut off": (lambda good: good[: len(good) // 2], r"cut off or damaged \(gzip\)"),
    "damaged": (_damaged, r"\(gzip\)|not a MaxMind database"),
    "empty": (lambda _: b"", "not a gzip file"),
    "a bomb": (lambda _: _bomb(), "unpacks to more than 2000000 bytes"),
    "a database without its end": (lambda g: gzip.compress(gzip.decompress(g)[:-300]), "not a MaxMind database"),
    "refused": (lambda _: 403, "HTTP 403"),
    "too often": (lambda _: 429, "HTTP 429"),
    "broken": (lambda _: 500, "HTTP 500"),
    "too large": (lambda _: bytes(1_500_000), "larger than 1000000 bytes"),
}


@pytest.mark.parametrize(("spoil", "why"), SPOILT.values(), ids=SPOILT.keys())
@pytest.mark.parametrize("which", [CITY, ASN], ids=["city", "asn"])
def test_what_cannot_be_used_leaves_the_old_one(
    spoil: Callable[[bytes], bytes | int], why: str, which: str, server: Server, folder: Path, tmp_path: Path,
    clock: ManualClock,
) -> None:  # fmt: skip
    server.dbip(tmp_path, "2026-12", country="DE", built=NOW - 40 * DAY)
    fetch(dbip(server.base), folder, clock)
    before = contents(folder)
    server.dbip(tmp_path)
    good = server.files[which]
    assert isinstance(good, bytes)
    server.files[which] = spoil(good)
    with pytest.raises(GeoError, match=why) as raised:
        fetch(dbip(server.base), folder, clock, download=1_000_000, unpacked=2_000_000)
    assert which in str(raised.value)
    assert contents(folder) == before
    assert [p.country for p in asked(folder, clock)] == ["DE"]


def test_a_connection_that_ends_early_leaves_the_old_one(
    server: Server, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    server.dbip(tmp_path)
    server.cut = 40
    with pytest.raises(GeoError, match=r"ended after \d+ of \d+ bytes"):
        fetch(dbip(server.base), folder, clock)
    assert contents(folder) == {}


def test_a_server_that_stops_in_the_middle_is_given_up(
    server: Server, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    import threading

    server.dbip(tmp_path)
    server.hold = threading.Event()
    with pytest.raises(GeoError, match=r"nothing came for 0\.3 s"):
        fetch(dbip(server.base), folder, clock, silence=0.3)
    assert contents(folder) == {}


def test_nobody_there(folder: Path, clock: ManualClock, free_port: int) -> None:
    with pytest.raises(GeoError, match="refused"):
        fetch(dbip(f"http://127.0.0.1:{free_port}"), folder, clock)


def test_older_than_what_is_installed_is_refused(
    server: Server, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    server.dbip(tmp_path, "2026-12")
    fetch(dbip(server.base), folder, clock)
    server.dbip(tmp_path, built=NOW - 60 * DAY)
    with pytest.raises(GeoError, match="is of 2026-11-16, older than the installed one of 2027-01-10"):
        fetch(dbip(server.base), folder, clock)


def test_places_where_networks_belong_are_refused(
    server: Server, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    server.dbip(tmp_path)
    server.files[ASN] = server.files[CITY]
    with pytest.raises(GeoError, match="has no networks"):
        fetch(dbip(server.base), folder, clock)


@pytest.mark.parametrize("built", [DAY, NOW + 30 * DAY], ids=["1970", "next month"])
def test_an_impossible_date_is_refused(
    built: float, server: Server, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    server.dbip(tmp_path, built=built)
    with pytest.raises(GeoError, match="impossible time"):
        fetch(dbip(server.base), folder, clock)


def test_two_updates_at_once(server: Server, folder: Path, clock: ManualClock) -> None:
    with locked(folder), pytest.raises(GeoError, match="another update is running"):
        fetch(dbip(server.base), folder, clock)


def test_what_a_killed_update_left_is_swept(server: Server, folder: Path, tmp_path: Path, clock: ManualClock) -> None:
    folder.mkdir(parents=True)
    (folder / "city-lite.part").write_bytes(b"half")
    server.dbip(tmp_path)
    fetch(dbip(server.base), folder, clock)
    assert not list(folder.glob("*.part"))


# --- a folder in which somebody else may write ---


class Watched(Web):
    """Each time a download begins, somebody who cannot know new names puts `plant` under those that he can guess."""

    def __init__(self, clock: ManualClock, names: list[Path], plant: Callable[[Path], None]) -> None:
        super().__init__(ssl.create_default_context(), clock, bounds=Bounds())
        self._names, self._plant = names, plant

    def save(self, url: str, to: Path, login: DownloadLogin | None = None) -> str:
        for path in self._names:
            path.unlink(missing_ok=True)
            self._plant(path)
        return super().save(url, to, login)


@pytest.mark.parametrize("kind", ["symlink", "dangling", "hardlink"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_planted_links_are_not_followed(
    kind: str, when: str, server: Server, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    server.dbip(tmp_path)
    fetch(dbip(server.base), tmp_path / "known", clock)  # the names are those of the contents
    final = [p.name for p in (tmp_path / "known").iterdir() if not p.name.startswith(".")]
    parts = ["city-lite.gz.part", "city-lite.part", "asn-lite.gz.part", "asn-lite.part", "geo.json.part"]
    folder.mkdir(parents=True)
    names = [folder / name for name in (*parts, *final)]
    victim, nobody = tmp_path / "victim", tmp_path / "nobody"
    victim.write_bytes(b"somebody else's")
    victim.chmod(0o600)

    def plant(path: Path) -> None:
        if kind == "hardlink":
            path.hardlink_to(victim)
        else:
            path.symlink_to(victim if kind == "symlink" else nobody)

    if when == "before":
        for path in names:
            plant(path)
        assert fetch(dbip(server.base), folder, clock)
    else:
        assert update(dbip(server.base), folder, Watched(clock, names, plant), clock).changed
    assert (victim.read_bytes(), victim.stat().st_mode & 0o777, victim.stat().st_nlink) == (
        b"somebody else's",
        0o600,
        1,
    )
    assert not nobody.exists()
    assert sorted(contents(folder)) == sorted(final)
    assert {p.lstat().st_mode for p in folder.iterdir()} == {stat.S_IFREG | 0o644}
    assert len(asked(folder, clock)) == 1


def test_a_link_in_the_place_of_the_lock_is_not_followed(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(parents=True)
    (folder / ".lock").symlink_to(tmp_path / "nobody")
    with pytest.raises(GeoError, match="symbolic links"), locked(folder):
        pass
    assert not (tmp_path / "nobody").exists()


def test_a_link_in_the_place_of_what_was_fetched_opens_no_file(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(parents=True)
    (victim := tmp_path / "victim").write_bytes(b"somebody else's")
    victim.chmod(0o600)
    (folder / "x.part").symlink_to(victim)
    entry = Entry(name="x.mmdb", type="x", holds=("places",), built=0, size=1, sha256="", origin="")
    collection = Collection(source="mmdb", fetched=NOW, licence="", credit="", files=(entry,))
    install(folder, collection, (folder / "x.part",))
    assert victim.stat().st_mode & 0o777 == 0o600


def test_a_file_is_its_writers_alone_until_it_is_whole(tmp_path: Path) -> None:
    with writing(path := tmp_path / "x") as file:
        file.write(b"half")
        assert path.stat().st_mode & 0o777 == 0o600
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"half", 0o644)
    with pytest.raises(FileExistsError), writing(path):
        pass


def test_a_folder_that_is_called_like_a_leftover_stops_nothing(
    server: Server, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    (folder / "city-lite.part").mkdir(parents=True)
    server.dbip(tmp_path)
    assert fetch(dbip(server.base), folder, clock)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_the_old_one(server: Server, tmp_path: Path, clock: ManualClock) -> None:
    (folder := tmp_path / "small").mkdir()
    with small_disk(folder, "200k"):
        server.dbip(tmp_path, "2026-12", built=NOW - 40 * DAY)
        fetch(dbip(server.base), folder, clock)
        before = contents(folder)
        server.dbip(tmp_path)
        server.files[CITY] = gzip.compress(os.urandom(400_000))
        with pytest.raises(GeoError, match="No space left"):
            fetch(dbip(server.base), folder, clock)
        server.files[CITY] = gzip.compress(bytes(900_000))
        with pytest.raises(GeoError, match="No space left"):
            fetch(dbip(server.base), folder, clock)
        assert contents(folder) == before


# --- MaxMind ---


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[Server, Server, Path]]:
    """MaxMind's server and its storage, both HTTPS, and the authority behind them."""
    ca = Authority(tmp_path)
    pair = ca.issue("server", ["127.0.0.1"])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pair.cert, pair.key)
    with serving(tls) as permalinks, serving(tls) as storage:
        yield permalinks, storage, ca.file


def by_key(server: Server) -> Vendor:
    return maxmind(server.base, DownloadLogin(account="12345", key=Secret(KEY)))


def test_maxmind_by_key_and_the_key_goes_no_further(
    secured: tuple[Server, Server, Path], folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    permalinks, storage, ca = secured
    permalinks.maxmind(tmp_path, storage)
    done = update(by_key(permalinks), folder, web(clock, ca), clock)
    assert {login for _, login in permalinks.got} == {"Basic MTIzNDU6azN5LXRoYXQtbm9ib2R5LW1heS1zZWU="}
    assert {login for _, login in storage.got} == {None}
    (place,) = asked(folder, clock)
    assert (place.source, place.city, place.asn) == ("maxmind:2027-01-10", "Amsterdam", 39351)
    assert "MaxMind" in done.collection.credit
    written = (folder / "geo.json").read_text()
    assert KEY not in written
    assert "s1gned" not in written


def test_maxmind_fetches_only_what_is_new(
    secured: tuple[Server, Server, Path], folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    permalinks, storage, ca = secured
    permalinks.maxmind(tmp_path, storage)
    update(by_key(permalinks), folder, web(clock, ca), clock)
    storage.got.clear()
    assert not update(by_key(permalinks), folder, web(clock, ca), clock).changed
    assert storage.got == []


def test_a_wrong_checksum_is_refused(
    secured: tuple[Server, Server, Path], folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    permalinks, storage, ca = secured
    permalinks.maxmind(tmp_path, storage)
    name = "/geoip/databases/GeoLite2-City/download?suffix=tar.gz.sha256"
    permalinks.files[name] = b"0" * 64 + b"  x\n"
    with pytest.raises(GeoError, match="SHA-256 is not the one"):
        update(by_key(permalinks), folder, web(clock, ca), clock)
    permalinks.files[name] = b"<html>"
    with pytest.raises(GeoError, match="holds no SHA-256"):
        update(by_key(permalinks), folder, web(clock, ca), clock)
    assert contents(folder) == {}


def test_a_refused_key_is_told_without_it(
    secured: tuple[Server, Server, Path], folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    permalinks, _, ca = secured
    permalinks.files["/geoip/databases/GeoLite2-City/download?suffix=tar.gz.sha256"] = 401
    with pytest.raises(GeoError, match="does not accept this account and key") as raised:
        update(by_key(permalinks), folder, web(clock, ca), clock)
    assert KEY not in str(raised.value)


def test_a_way_out_of_https_is_not_taken(
    secured: tuple[Server, Server, Path], server: Server, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    permalinks, _, ca = secured
    permalinks.maxmind(tmp_path, server)  # its storage speaks plain HTTP
    with pytest.raises(GeoError, match="from HTTPS to plain HTTP") as raised:
        update(by_key(permalinks), folder, web(clock, ca), clock)
    assert "s1gned" not in str(raised.value)
    assert server.got == []


def test_a_server_of_another_authority_is_refused(
    secured: tuple[Server, Server, Path], folder: Path, clock: ManualClock
) -> None:
    with pytest.raises(GeoError, match="certificate is not trusted"):
        update(by_key(secured[0]), folder, web(clock), clock)
    assert secured[0].got == []


# --- files ---


def test_files_of_any_packing(folder: Path, tmp_path: Path, clock: ManualClock) -> None:
    from tests.agent.geo.world import tar_gz

    city = tmp_path / "city.mmdb.gz"
    city.write_bytes(gzip.compress(mmdb(tmp_path / "c.mmdb", "Somebody-City")))
    asn = tmp_path / "asn.tar.gz"
    asn.write_bytes(tar_gz("any", mmdb(tmp_path / "a.mmdb", "Somebody-ASN")))
    assert fetch(from_files((city, asn)), folder, clock)
    (place,) = asked(folder, clock)
    assert (place.source, place.city, place.asn) == ("mmdb:2027-01-10", "Amsterdam", 39351)


def test_files_of_a_known_vendor_are_its_own(folder: Path, tmp_path: Path, clock: ManualClock) -> None:
    mmdb(tmp_path / "a.mmdb", "GeoLite2-ASN", asn=64500)
    mmdb(tmp_path / "c.mmdb", "GeoLite2-City")
    fetch(from_files((tmp_path / "c.mmdb", tmp_path / "a.mmdb")), folder, clock)
    mmdb(tmp_path / "c.mmdb", "GeoLite2-City", country="SE", built=NOW - 4 * DAY)
    fetch(from_files((tmp_path / "c.mmdb",)), folder, clock)  # the networks stay
    (place,) = asked(folder, clock)
    assert (place.source, place.country, place.asn) == ("maxmind:2027-01-10", "SE", 64500)
    (collection,) = (read_manifest(folder) or Manifest()).collections
    assert "MaxMind" in collection.credit
    mmdb(tmp_path / "c.mmdb", "GeoLite2-City", built=NOW - 9 * DAY)
    with pytest.raises(GeoError, match="older than the installed one"):
        fetch(from_files((tmp_path / "c.mmdb",)), folder, clock)


def test_a_file_that_is_missing_is_named(folder: Path, tmp_path: Path, clock: ManualClock) -> None:
    with pytest.raises(GeoError, match=re.escape(f"{tmp_path}/none.mmdb: No such file")):
        fetch(from_files((tmp_path / "none.mmdb",)), folder, clock)


def test_an_extended_header_is_passed_over_unread(tmp_path: Path) -> None:
    """The tarfile module takes hours for this one."""
    head, size = tarfile.TarInfo("././@PaxHeader"), 64 * 1024 * 1024
    head.type, head.size = tarfile.XHDTYPE, size
    data = tarfile.TarInfo("GeoLite2-ASN_20260101/GeoLite2-ASN.mmdb")
    data.size = 5
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(head.tobuf() + b"1" * size + data.tobuf() + b"whole".ljust(512, b"\0") + b"\0" * 1024)
    assert only_database(tmp_path / "x.tar", tmp_path / "x.mmdb", 10) == "GeoLite2-ASN.mmdb"
    assert (tmp_path / "x.mmdb").read_bytes() == b"whole"
    with pytest.raises(GeoError, match="more than 4 bytes"):
        only_database(tmp_path / "x.tar", tmp_path / "x.mmdb", 4)


@pytest.mark.parametrize("what", ["link", "nothing"])
def test_a_tar_file_without_a_database(what: str, folder: Path, tmp_path: Path, clock: ManualClock) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        if what == "link":
            info = tarfile.TarInfo("x/shadow.mmdb")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/shadow"
            tar.addfile(info)
    (tmp_path / "x.tar.gz").write_bytes(packed.getvalue())
    with pytest.raises(GeoError, match=r"holds no \.mmdb"):
        fetch(from_files((tmp_path / "x.tar.gz",)), folder, clock)


def test_sources_stand_side_by_side_and_may_disagree(
    server: Server, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    server.dbip(tmp_path, country="NL")
    mmdb(tmp_path / "mine.mmdb", "both", country="SE")
    fetch(from_files((tmp_path / "mine.mmdb",)), folder, clock)
    fetch(dbip(server.base), folder, clock)
    assert {(p.source, p.country) for p in asked(folder, clock)} == {
        ("mmdb:2027-01-10", "SE"),
        ("dbip:2027-01-10", "NL"),
    }
