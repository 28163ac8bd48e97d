"""`vpn-sentinel doctor` as a person runs it, with and without rights, network, settings and server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.agent.doubles import http, reply
from tests.agent.geo.world import mmdb
from tests.cli.users import as_user
from vpn_sentinel.agent.doctor.check import Check, CheckState, gap, ok
from vpn_sentinel.agent.doctor.examine import CHECKS, examine
from vpn_sentinel.agent.doctor.lenient import read_all
from vpn_sentinel.cli.doctor import show
from vpn_sentinel.cli.main import main
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.settings import Source
from vpn_sentinel.wire import codec
from vpn_sentinel.wire.messages import Exchange, Welcome
from vpn_sentinel.wire.problem import CONTENT_TYPE, problem

KEY = "k3y-that-nobody-may-see"
COMMAND = [sys.executable, "-m", "vpn_sentinel", "doctor"]
# These have nothing to say without something that is not here, or not configured.
_QUIET = {"gluetun", "pulse", "DNS zone", "VPN program"}
_LIMIT = 10.0  # seconds that it promises

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing the user takes root")


def run(*before: str, words: tuple[str, ...] = ("--json",), **more: Any) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **{f"VPN_SENTINEL_{k}": v for k, v in more.pop("settings", {}).items()}}
    clock = SystemClock()
    began = clock.boottime()
    done = subprocess.run(
        [*before, *COMMAND, *words], env=env, capture_output=True, text=True, timeout=30, check=False, **more
    )
    assert clock.boottime() - began < _LIMIT
    assert done.stderr == ""
    return done


def states(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Name → state; of several with one name the worst."""
    said = json.loads(done.stdout)
    assert list(said) == ["checks"]
    order = ["ok", "unknown", "gap"]
    found: dict[str, str] = {}
    for check in said["checks"]:
        assert list(check) == ["name", "state", "found", "means", "fix"]
        found[check["name"]] = max(found.get(check["name"], "ok"), check["state"], key=order.index)
    return found


def test_without_any_setting_it_says_what_is_not_configured() -> None:
    done = run()
    found = states(done)
    assert done.returncode == 1
    assert found["settings"] == "ok"
    assert found["server"] == found["home addresses"] == "gap"


@as_root
def test_without_rights(open_path: Path) -> None:
    done = run(*as_user(65534, open_path), cwd="/", settings={"DATA_DIR": "/proc/none"})
    found = states(done)
    assert done.returncode == 1
    assert {found[n] for n in ("CAP_NET_RAW", "CAP_NET_ADMIN", "leak watch", "data folder")} == {"gap"}
    assert found["system"] == found["settings"] == "ok"
    assert "uid 65534" in done.stdout


def test_without_any_network() -> None:
    done = run("unshare", "--user", "--net", "--map-root-user")
    found = states(done)
    assert done.returncode == 1
    assert found["route IPv4"] == found["way out"] == found["tunnel"] == "gap"
    assert found["route IPv6"] == "ok"
    assert found["kill switch"] == found["clock"] == "unknown"


def test_for_people_each_gap_has_its_fix() -> None:
    done = run(words=())
    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout
    gaps = [line for line in lines if line.startswith("✗")]
    assert len([line for line in lines if line.strip().startswith("→")]) >= len(gaps) > 0
    assert lines[-1].endswith("unknown")
    found = [line[2:].index(line[2:].split("  ")[-1].strip()) for line in lines if line[:1] in "✓✗?"]
    assert len({f for f in found if f}) <= 2  # aligned


def test_settings_that_cannot_be_used_are_all_told(tmp_path: Path) -> None:
    (tmp_path / "x.mmdb").write_text("none")
    done = run(settings={
        "URL": f"http://me:{KEY}@sentinel.example", "INTERVAL": "soon", "HEALTH_PORT": "0", "INTERVALL": "30",
        "API_KEY": KEY, "GEO_DB": str(tmp_path / "x.mmdb"),
    })  # fmt: skip
    told = [c["found"].split(":")[0] for c in json.loads(done.stdout)["checks"] if c["name"] == "settings"]
    assert sorted(t.removeprefix("VPN_SENTINEL_") for t in told) == ["HEALTH_PORT", "INTERVAL", "INTERVALL", "URL"]
    assert states(done)["places"] == "gap"
    assert KEY not in done.stdout


def test_a_file_that_is_no_toml_is_told_and_the_rest_looked_at(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("url = [")
    done = run(words=("--json", "--config", str(tmp_path / "c.toml")))
    found = states(done)
    assert found["settings"] == "gap"
    assert "system" in found


def test_wrong_usage_is_one_line_and_64(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["doctor", "--nonsense"])
    assert raised.value.code == 64
    assert capsys.readouterr().err.count("\n") == 1


def test_an_installed_database_is_found(tmp_path: Path) -> None:
    now = SystemClock().wall()
    mmdb(tmp_path / "mine.mmdb", "both", built=now - 86400)
    assert main(["geo", "update", "--file", str(tmp_path / "mine.mmdb"), "--data-dir", str(tmp_path / "d")]) == 0
    done = run(settings={"DATA_DIR": str(tmp_path / "d")})
    assert states(done)["places"] == states(done)["data folder"] == "ok"
    next((tmp_path / "d" / "geo").glob("*.mmdb")).unlink()
    done = run(settings={"DATA_DIR": str(tmp_path / "d")})
    assert states(done)["places"] == "gap"
    assert ".mmdb: No such file" in done.stdout


async def test_a_server_is_greeted_and_given_no_report(tmp_path: Path) -> None:
    now = SystemClock().wall()

    def answer(request: str) -> bytes:
        if KEY in request:
            return reply(codec.encode(Welcome(ack=0, wall=now - 3600)))
        return reply(codec.encode(problem(401, "a key is needed")), 401, Content_Type=CONTENT_TYPE, VPN_Sentinel="1")

    async with http(answer) as (port, got):
        settings = {"URL": f"http://127.0.0.1:{port}", "API_KEY": KEY, "DATA_DIR": str(tmp_path)}
        read = read_all(Source({f"VPN_SENTINEL_{k}": v for k, v in settings.items()}))
        found = {c.name: c for c in await examine(read, SystemClock())}
        assert found["server"].state is CheckState.OK
        assert found["clock"].state is CheckState.GAP
        assert "ahead" in found["clock"].found
        said = codec.decoder(Exchange)(got[-1].split("\r\n\r\n")[1])
        assert said.reports.items == []
        del settings["API_KEY"]
        read = read_all(Source({f"VPN_SENTINEL_{k}": v for k, v in settings.items()}))
        found = {c.name: c for c in await examine(read, SystemClock())}
        assert found["server"].state is CheckState.GAP
        assert "token create" in found["server"].fix
        assert KEY not in f"{found}"


async def test_every_check_of_the_list_speaks(tmp_path: Path) -> None:
    read = read_all(Source({"VPN_SENTINEL_DATA_DIR": str(tmp_path)}))
    assert len({name for name, _ in CHECKS}) == len(CHECKS)
    assert len(await examine(read, SystemClock())) >= len(CHECKS) - len(_QUIET)


ONE_GAP = [ok("clock", "right"), gap("server", "away", "no report arrives.", "start it")]


@pytest.mark.parametrize(
    ("found", "said"),
    [(ONE_GAP, "1 ok, 1 gap, 0 unknown"), (ONE_GAP * 2, "2 ok, 2 gaps, 0 unknown")],
    ids=["one", "two"],
)
def test_the_last_line_counts(found: list[Check], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(found)
    assert capsys.readouterr().out.splitlines()[-1] == said
