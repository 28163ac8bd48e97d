"""Values as compose files, panels and shells hand them over: the real program starts, or says in a line what to change.

`check` looks at this machine, so only what it says of settings is looked at, and that it ends as it is documented to.
"""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.program import EXIT, HOME, KEY, Server

PROGRAM = [sys.executable, "-m", "vpn_sentinel"]
LOOKED = {0, 1, 2, 3, 4}  # how a look may end; 64 is wrong usage
ZONES = {
    "the system's file": ":/etc/localtime",
    "a name": "Europe/Madrid",
    "a name as a file of the system": ":Europe/Madrid",
    "POSIX": "CET-1CEST,M3.5.0,M10.5.0/3",
    "POSIX without letters": "<+03>-3",
    "UTC in quotes, as from an env file": '"UTC"',
    "nothing": "",
    "a colon": ":",
    "a name that is none": "Europe/Nowhere",
    "with a carriage return": "Europe/Madrid\r",
    "a folder": "/usr/share/zoneinfo",
}
TAKEN = {
    "ipwhois.app": {"VPN_SENTINEL_GEOLOCATION_SERVICE": "ipwhois.app"},
    "ipinfo": {"VPN_SENTINEL_GEOLOCATION_SERVICE": "ipinfo"},
    "IPINFO.IO": {"VPN_SENTINEL_GEOLOCATION_SERVICE": "IPINFO.IO"},
    "auto with a space": {"VPN_SENTINEL_GEOLOCATION_SERVICE": " auto "},
    "an empty one": {"VPN_SENTINEL_GEOLOCATION_SERVICE": ""},
    "spaces in a list": {"VPN_SENTINEL_HOME_NETWORKS": f" {HOME} , 2001:db8::/56 "},
    "a comma at the end": {"VPN_SENTINEL_HOME_NETWORKS": f"{HOME},"},
    "a network by one of its hosts": {"VPN_SENTINEL_HOME_NETWORKS": "83.46.112.77/24"},
    "countries in small letters": {"VPN_SENTINEL_EXPECTED_COUNTRIES": "nl, de"},
    "countries with spaces between them": {"VPN_SENTINEL_EXPECTED_COUNTRIES": "NL DE"},
    "networks on lines of their own": {"VPN_SENTINEL_HOME_NETWORKS": f"{HOME}\n2001:db8::/56\n"},
    "quotes, as from an env file": {
        "VPN_SENTINEL_DEBUG": '"true"',
        "VPN_SENTINEL_HOME_NETWORKS": f"'{HOME}'",
        "VPN_SENTINEL_TRACE_URL": '"https://1.1.1.1"',
    },
    "what is meant outside in another case": {"VPN_SENTINEL_MEANT_OUTSIDE": "Published 8000/TCP; Only User root"},
    "True": {"VPN_SENTINEL_DEBUG": "True"},
    "an old setting of another program": {"VPN_SENTINEL_CLIENT_SOMETHING": "1"},
    "a language that is not installed": {"LANG": "xx_XX.UTF-8", "LC_ALL": "xx_XX.UTF-8"},
    "no language": {"LC_ALL": "C"},
    "a proxy": {
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "ALL_PROXY": "socks5://127.0.0.1:9",
    },
    "a terminal that is none": {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "abc"},
}


def check(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "VPN_SENTINEL_DATA_DIR": str(folder)}
    # In a namespace of its own with nothing in it: no address is asked, and no answer is waited for.
    command = ["unshare", "--net", *PROGRAM, "check"]
    return subprocess.run(command, env=env | settings, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("zone", ZONES.values(), ids=ZONES.keys())
def test_a_server_starts_in_whatever_zone(zone: str, tmp_path: Path) -> None:
    with closing(Server(tmp_path, TZ=zone)) as server:
        assert server.keepalive("nl", EXIT)[0] == 200
        assert server.state("nl") == "protected"
        assert "Traceback" not in server.said()


@pytest.mark.parametrize("zone", ZONES.values(), ids=ZONES.keys())
def test_a_look_in_whatever_zone(zone: str, tmp_path: Path) -> None:
    done = check(tmp_path, TZ=zone)
    assert done.returncode in LOOKED, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("host", ["[::]", "localhost", '"0.0.0.0"'])
def test_a_server_listens_on_what_people_write(host: str, tmp_path: Path) -> None:
    with closing(Server(tmp_path, VPN_SENTINEL_SERVER_HOST=host, VPN_SENTINEL_API_KEY=f'"{KEY}"')) as server:
        assert server.keepalive("nl", EXIT)[0] == 200


@pytest.mark.parametrize("settings", TAKEN.values(), ids=TAKEN.keys())
def test_what_people_write_is_taken(settings: dict[str, str], tmp_path: Path) -> None:
    done = check(tmp_path, **settings)
    assert done.returncode in LOOKED, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file of names: needs root")
def test_a_name_with_an_address_at_which_no_server_listens_is_said_by_the_doctor(tmp_path: Path) -> None:
    """The name has an address of each family, and the server was told to listen on one of them."""
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost sentinel.test\n::1 sentinel.test\n")
    with closing(Server(tmp_path, VPN_SENTINEL_SERVER_HOST="127.0.0.1")) as server:
        env = {
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "VPN_SENTINEL_DATA_DIR": str(tmp_path / "agent"),
            "VPN_SENTINEL_URL": f"http://sentinel.test:{server.port}",
            "VPN_SENTINEL_ALLOW_INSECURE": "true",
            "VPN_SENTINEL_API_KEY": KEY,
            "VPN_SENTINEL_TRACE_URL": "http://127.0.0.1:9",
        }
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", script, str(names), *PROGRAM, "doctor"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90, check=False)
    assert "Traceback" not in done.stderr
    assert "nobody answers at ::1" in done.stdout.lower(), done.stdout
