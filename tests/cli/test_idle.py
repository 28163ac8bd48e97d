"""A setting that does nothing as the others stand is told as the program starts, and it starts all the same."""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.program import Server
from vpn_sentinel.cli.main import main
from vpn_sentinel.cli.settings import settings_of
from vpn_sentinel.runtime.idle import idle
from vpn_sentinel.runtime.settings import Source

SAID = {
    "a login without its client": (
        "agent",
        {"TRANSMISSION_USER": "u"},
        "TRANSMISSION_USER: does nothing without {}TRANSMISSION_URL",
    ),
    "a limit of nothing": (
        "agent",
        {"REMEDY_CAP": "3"},
        "REMEDY_CAP: does nothing without {0}HOOK or {0}REMEDY_GLUETUN_RESTART or {0}QBITTORRENT_URL or "
        "{0}TRANSMISSION_URL",
    ),
    "for what is turned off": (
        "agent",
        {"GLUETUN_API_KEY": "k", "REMEDY_GLUETUN_RESTART": "false"},
        "GLUETUN_API_KEY: does nothing without {0}GLUETUN_URL or {0}REMEDY_GLUETUN_RESTART",
    ),
    "what a reference agent does not do": (
        "agent",
        {"CONTAIN": "on", "ROLE": "Reference", "SITE": "home"},
        "CONTAIN: does nothing while {}ROLE=Reference",
    ),
    "a signature of nothing": ("server", {"WEBHOOK_SECRET": "s"}, "WEBHOOK_SECRET: does nothing without {}WEBHOOK_URL"),
    "a zone's nameserver": ("server", {"CANARY_NS": "ns.example"}, "CANARY_NS: does nothing without {}CANARY_ZONE"),
    "the port of no dashboard": (
        "server",
        {"SERVER_DASHBOARD_PORT": "81", "SERVER_DASHBOARD_ENABLED": "no"},
        "SERVER_DASHBOARD_PORT: does nothing while {}SERVER_DASHBOARD_ENABLED=no",
    ),
    "backups of another's database": (
        "server",
        {"BACKUP_DIR": "/b", "DATABASE_URL": "postgresql://u:HUSH@h/n"},
        "BACKUP_DIR: does nothing while {}DATABASE_URL=postgresql://…",
    ),
    "how many of none": (
        "server",
        {"BACKUP_KEEP": "3", "BACKUP_HOURS": "0"},
        "BACKUP_KEEP: does nothing while {}BACKUP_HOURS=0",
    ),
    "whose files": ("geo", {"MAXMIND_URL": "https://h"}, "MAXMIND_URL: does nothing without {}MAXMIND_KEY"),
}
NOTHING = {
    "nothing set": {},
    "turned off": {"REMEDY_RESUME": "false", "WEBHOOK_ALLOW_PRIVATE": "no", "REMEDY_AFTER": "0"},
    "all that belongs together": {"TRANSMISSION_USER": "u", "TRANSMISSION_PASSWORD": "p", "TRANSMISSION_URL": "http://h"},
    "gluetun where it usually is": {"GLUETUN_API_KEY": "k", "REMEDY_GLUETUN_RESTART": "true"},
    "a tunnel's agent": {"CONTAIN": "on", "ROLE": "tunnel"},
    "backups": {"BACKUP_DIR": "/b", "BACKUP_KEEP": "2", "BACKUP_HOURS": "1.5", "DATABASE_URL": "sqlite:////x/y"},
}  # fmt: skip


def of(settings: dict[str, str], *readers: str) -> tuple[str, ...]:
    source = Source(env={f"VPN_SENTINEL_{name}": value for name, value in settings.items()})
    return tuple(line for reader in readers for line in idle(source, settings_of(reader)))


@pytest.mark.parametrize(("reader", "settings", "said"), SAID.values(), ids=SAID.keys())
def test_what_does_nothing_is_told(reader: str, settings: dict[str, str], said: str) -> None:
    assert of(settings, reader) == ("VPN_SENTINEL_" + said.format("VPN_SENTINEL_"),)


@pytest.mark.parametrize("settings", NOTHING.values(), ids=NOTHING.keys())
def test_what_does_something_is_not(settings: dict[str, str]) -> None:
    assert of(settings, "server", "agent", "geo") == ()


@pytest.mark.parametrize("reader", ["server", "agent", "geo"])
def test_what_a_setting_needs_is_read_by_the_same_command(reader: str) -> None:
    settings = settings_of(reader)
    rows = [row for setting in settings for row in setting.idle]
    assert {name for row in rows for name in (*row.needs, row.disabled_by) if name} <= {s.name for s in settings}


def test_a_server_says_so_and_starts(tmp_path: Path) -> None:
    with closing(Server(tmp_path, VPN_SENTINEL_WEBHOOK_SECRET="s3cret")) as server:
        assert (
            "vpn-sentinel: VPN_SENTINEL_WEBHOOK_SECRET: does nothing without VPN_SENTINEL_WEBHOOK_URL\n"
            in server.said()
        )
        assert "s3cret" not in server.said()


def test_an_agent_says_so_before_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VPN_SENTINEL_TRANSMISSION_USER", "u")
    monkeypatch.setenv("VPN_SENTINEL_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("VPN_SENTINEL_API_KEY", "k" * 12)
    assert main(["agent", "--data-dir", str(tmp_path / "file" / "x")]) == 1  # nothing is started
    first, second = capfd.readouterr().err.splitlines()
    assert first == "vpn-sentinel: VPN_SENTINEL_TRANSMISSION_USER: does nothing without VPN_SENTINEL_TRANSMISSION_URL"
    assert second.startswith("vpn-sentinel: VPN_SENTINEL_DATA_DIR: ")


def test_the_doctor_says_so_too(tmp_path: Path) -> None:
    env = {
        "PATH": os.environ["PATH"],
        "VPN_SENTINEL_DATA_DIR": str(tmp_path),
        "VPN_SENTINEL_TRANSMISSION_USER": "u",
        "VPN_SENTINEL_TRACE_URL": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "vpn_sentinel", "doctor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "TRANSMISSION_USER: does nothing without" in done.stdout
