"""`geo update` and `geo show` as a person runs them, against servers on the loopback."""

import gzip
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lab.certs import Authority
from tests.agent.geo.world import DAY, Server, mmdb, serving
from vpn_sentinel.cli.main import main
from vpn_sentinel.runtime.clock import SystemClock

KEY = "k3y-that-nobody-may-see"
NOW = SystemClock().wall()
MONTH = datetime.fromtimestamp(NOW, UTC).strftime("%Y-%m")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


def run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **{f"VPN_SENTINEL_{k}": v for k, v in settings.items()}}
    command = [sys.executable, "-m", "vpn_sentinel", "geo", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


def test_update_and_show(server: Server, tmp_path: Path) -> None:
    server.dbip(tmp_path, MONTH, built=NOW - 3 * DAY)
    facts = {"DATA_DIR": str(tmp_path / "data"), "DBIP_URL": server.base}
    nothing = run("show", **facts)
    assert (nothing.returncode, "No database in" in nothing.stdout) == (0, True)
    done = run("update", **facts)
    assert (done.returncode, done.stderr) == (0, "")
    assert "DBIP-City-Lite" in done.stdout
    assert "https://db-ip.com" in done.stdout
    again = run("update", **facts)
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "is current already")
    shown = run("show", **facts)
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["SOURCE", "dbip", "dbip", "IP"]
    assert shown.stdout.count("3 days") == 2
    assert "https://db-ip.com" in shown.stdout
    said = json.loads(run("show", "--json", **facts).stdout)
    assert [(f["source"], f["state"], f["days"]) for f in said["files"]] == [("dbip", "whole", 3)] * 2
    next((tmp_path / "data" / "geo").glob("*.mmdb")).write_bytes(b"x")
    assert "damaged" in run("show", **facts).stdout


def test_an_old_one_is_said_to_be_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data-dir", str(tmp_path / "data")]
    for days in (50, 120):
        mmdb(tmp_path / f"{days}.mmdb", "both", built=NOW - days * DAY)
    assert main(["geo", "update", "--file", str(tmp_path / "120.mmdb"), *words]) == 0
    assert main(["geo", "show", *words]) == 0
    assert "120 days, much too old" in capsys.readouterr().out
    assert main(["geo", "update", "--file", str(tmp_path / "50.mmdb"), *words]) == 0
    assert main(["geo", "show", *words]) == 0
    assert "50 days, old" in capsys.readouterr().out
    assert main(["geo", "update", "--file", str(tmp_path / "120.mmdb"), *words]) == 1
    assert "older than the installed one" in capsys.readouterr().err


def test_the_key_is_in_no_output(tmp_path: Path) -> None:
    pair = (ca := Authority(tmp_path)).issue("server", ["127.0.0.1"])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pair.cert, pair.key)
    with serving(tls) as permalinks, serving(tls) as storage:
        permalinks.maxmind(tmp_path, storage, built=NOW - 3 * DAY)
        facts = {
            "DATA_DIR": str(tmp_path / "data"), "MAXMIND_URL": permalinks.base, "CA_FILE": str(ca.file),
            "MAXMIND_ACCOUNT": "12345", "MAXMIND_KEY": KEY, "DEBUG": "true",
        }  # fmt: skip
        done = [run("update", **facts), run("show", **facts), run("show", "--json", **facts)]
        assert [d.returncode for d in done] == [0, 0, 0]
        name = "/geoip/databases/GeoLite2-City/download?suffix=tar.gz"
        for answer in (401, 500, (302, {"Location": f"https://127.0.0.1:1/{KEY}?s1gned"}), b"<html>"):
            permalinks.files[name + ".sha256"] = answer
            done.append(run("update", **facts))
            assert done[-1].returncode == 1
            assert done[-1].stderr.count("\n") == 1
        for d in done:
            for secret in (KEY, "s1gned", "MTIzNDU6"):
                assert secret not in d.stdout + d.stderr
        assert "MaxMind" in done[0].stdout


WRONG = {
    "a key without its account": ({"MAXMIND_KEY": KEY}, "VPN_SENTINEL_MAXMIND_ACCOUNT"),
    "an account without its key": ({"MAXMIND_ACCOUNT": "1"}, "VPN_SENTINEL_MAXMIND_KEY"),
    "the key as account": ({"MAXMIND_KEY": KEY, "MAXMIND_ACCOUNT": KEY}, "VPN_SENTINEL_MAXMIND_ACCOUNT"),
    "the key in clear": (
        {"MAXMIND_KEY": KEY, "MAXMIND_ACCOUNT": "1", "MAXMIND_URL": "http://maxmind.example"},
        "VPN_SENTINEL_MAXMIND_URL",
    ),
    "a login in an address": ({"DBIP_URL": f"https://me:{KEY}@mirror.example"}, "VPN_SENTINEL_DBIP_URL"),
}


@pytest.mark.parametrize(("settings", "named"), WRONG.values(), ids=WRONG.keys())
def test_settings_that_cannot_be_used(settings: dict[str, str], named: str, tmp_path: Path) -> None:
    done = run("update", DATA_DIR=str(tmp_path), **settings)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert named in done.stderr
    assert KEY not in done.stderr


def test_maxmind_without_a_key_says_what_it_takes(tmp_path: Path) -> None:
    done = run("update", "--source", "maxmind", DATA_DIR=str(tmp_path))
    assert (done.returncode, "VPN_SENTINEL_MAXMIND_ACCOUNT" in done.stderr) == (1, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_an_interrupted_fetch_leaves_the_old_one(number: signal.Signals, server: Server, tmp_path: Path) -> None:
    facts = {"DATA_DIR": str(tmp_path / "data"), "DBIP_URL": server.base}
    old = datetime.fromtimestamp(NOW, UTC).replace(day=1).timestamp() - DAY
    before_month = datetime.fromtimestamp(old, UTC).strftime("%Y-%m")
    server.dbip(tmp_path, before_month, built=NOW - 40 * DAY)
    assert run("update", **facts).returncode == 0
    geo = tmp_path / "data" / "geo"
    before = {p.name: p.read_bytes() for p in geo.glob("*.*mmdb")} | {"geo.json": (geo / "geo.json").read_bytes()}
    server.dbip(tmp_path, MONTH, built=NOW - 3 * DAY)
    city = server.files[f"/free/dbip-city-lite-{MONTH}.mmdb.gz"]
    assert isinstance(city, bytes)
    server.files[f"/free/dbip-city-lite-{MONTH}.mmdb.gz"] = gzip.compress(os.urandom(3_000_000))
    server.hold = threading.Event()
    env = {"PATH": os.environ["PATH"], **{f"VPN_SENTINEL_{k}": v for k, v in facts.items()}}
    with subprocess.Popen(
        [sys.executable, "-m", "vpn_sentinel", "geo", "update"], env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        limit = SystemClock().boottime() + 10
        while not any(p.stat().st_size > 500_000 for p in geo.glob("*.part")):
            assert SystemClock().boottime() < limit
            threading.Event().wait(0.02)
        process.send_signal(number)
        process.wait(10)
    server.hold.set()
    assert process.returncode != 0
    after = {p.name: p.read_bytes() for p in geo.glob("*.*mmdb")} | {"geo.json": (geo / "geo.json").read_bytes()}
    assert after == before
    server.hold = None
    server.files[f"/free/dbip-city-lite-{MONTH}.mmdb.gz"] = city
    assert run("update", **facts).returncode == 0
    assert not list(geo.glob("*.part"))


def test_progress_is_for_terminals_only(server: Server, tmp_path: Path) -> None:
    import pty

    server.dbip(tmp_path, MONTH, built=NOW - 3 * DAY)
    ours, theirs = pty.openpty()
    env = {
        "PATH": os.environ["PATH"],
        "VPN_SENTINEL_DATA_DIR": str(tmp_path / "d"),
        "VPN_SENTINEL_DBIP_URL": server.base,
    }
    done = subprocess.run(
        [sys.executable, "-m", "vpn_sentinel", "geo", "update"], env=env, stderr=theirs, stdout=subprocess.PIPE,
        timeout=30, check=True,
    )  # fmt: skip
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert " MB" in shown
    assert b" MB" not in done.stdout
