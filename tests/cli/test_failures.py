"""What cannot be used ends a command with one line that says what, where and why."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vpn_sentinel.cli.main import main
from vpn_sentinel.cli.notify import CHANNELS
from vpn_sentinel.server.notify.channels.telegram import TelegramChannel
from vpn_sentinel.server.notify.channels.webhook import WebhookChannel


def run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Not in this process: a command that runs on sets up the log."""
    env = {"PATH": os.environ["PATH"], **{f"VPN_SENTINEL_{k}": v for k, v in settings.items()}}
    command = [sys.executable, "-m", "vpn_sentinel", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def below_a_file(tmp_path: Path) -> str:
    (tmp_path / "file").touch()
    return str(tmp_path / "file" / "x")


# --- folders ---

LOOKING = ["tunnel list", "tunnel show x", "token list", "token revoke x", "db check"]


@pytest.mark.parametrize("command", LOOKING)
def test_a_database_that_cannot_be_looked_for(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("x" * 300)  # as a folder of another user's, but for root too
    monkeypatch.setenv("VPN_SENTINEL_DATA_DIR", str(folder))
    assert main(command.split()) == 1
    said = f"vpn-sentinel: VPN_SENTINEL_DATA_DIR: {folder}/sentinel.db: File name too long\n"
    assert capsys.readouterr() == ("", said)


def test_the_setting_that_said_where_is_named(below_a_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tunnel", "list", "--database-url", f"sqlite:///{below_a_file}/s.db"]) == 1
    said = f"vpn-sentinel: VPN_SENTINEL_DATABASE_URL: {below_a_file}/s.db: Not a directory\n"
    assert capsys.readouterr() == ("", said)


def test_a_folder_in_the_place_of_the_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["db", "migrate", "--database-url", f"sqlite:///{tmp_path}"]) == 1
    said = f"vpn-sentinel: VPN_SENTINEL_DATABASE_URL: database {tmp_path} is a folder: name a file\n"
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("command", LOOKING)
def test_a_database_that_is_not_there_yet(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--data-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"vpn-sentinel: there is no database at {tmp_path}/sentinel.db: ")


@pytest.mark.parametrize("command", ["token create x", "db migrate"])
def test_a_database_that_cannot_be_made(command: str, below_a_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--data-dir", below_a_file]) == 1
    said = f"vpn-sentinel: VPN_SENTINEL_DATA_DIR: data folder {below_a_file}: Not a directory\n"
    assert capsys.readouterr() == ("", said)


def test_a_damaged_database_is_no_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sentinel.db").write_bytes(b"no database" * 1000)
    assert main(["db", "check", "--data-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"vpn-sentinel: database {tmp_path}/sentinel.db: ")


@pytest.mark.parametrize("command", ["server", "up"])
def test_a_server_without_its_folder(command: str, below_a_file: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [str(s.getsockname()[1]) for s in (one, two)]
    done = run(
        command, DATA_DIR=below_a_file, SERVER_API_PORT=ports[0], SERVER_HEALTH_PORT=ports[1],
        SERVER_WEB_DASHBOARD_ENABLED="false",
    )  # fmt: skip
    said = f"vpn-sentinel: VPN_SENTINEL_DATA_DIR: data folder {below_a_file}: Not a directory\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_an_agent_without_its_folder_says_it_once(below_a_file: str) -> None:
    done = run("agent", DATA_DIR=below_a_file, URL="http://127.0.0.1:9", API_KEY="k" * 8)
    said = f"vpn-sentinel: VPN_SENTINEL_DATA_DIR: {below_a_file}: Not a directory\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("held", ["nothing", ""])
def test_an_agent_with_a_database_of_places_that_is_none(held: str, tmp_path: Path) -> None:
    (tmp_path / "x.mmdb").write_text(held)
    done = run("agent", DATA_DIR=str(tmp_path), URL="http://127.0.0.1:9", API_KEY="k" * 8, GEO_DB=f"{tmp_path}/x.mmdb")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr == f"vpn-sentinel: VPN_SENTINEL_GEO_DB: {tmp_path}/x.mmdb: is not a MaxMind database file\n"


# --- ports, files, channels ---


def test_a_port_of_someone_elses(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("agent", DATA_DIR=str(tmp_path), URL="http://127.0.0.1:9", API_KEY="k" * 8, HEALTH_PORT=str(port))
    said = f"vpn-sentinel: VPN_SENTINEL_HEALTH_PORT: cannot listen on 127.0.0.1 port {port}: Address already in use"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["tunnel", "list", "--config", "/none.toml"], 1, "configuration file /none.toml: No such file or directory"),
        (["check", "--policy", "/none.toml"], 64, "--policy /none.toml: No such file or directory"),
    ],
)
def test_a_file_that_is_not_there(words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == status
    assert capsys.readouterr() == ("", f"vpn-sentinel: {said}\n")


def test_the_channels_have_these_names() -> None:
    assert set(CHANNELS) == {TelegramChannel.name, WebhookChannel.name}


@pytest.mark.parametrize(
    ("channel", "settings"),
    [("telegram", ("TELEGRAM_BOT_TOKEN", "TELEGRAM_CHAT_ID")), ("webhook", ("VPN_SENTINEL_WEBHOOK_URL",))],
)
def test_a_channel_that_is_not_set_up(
    channel: str, settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["notify", "test", channel]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"vpn-sentinel: {channel} is not set up")
    assert said.endswith(f": set {' and '.join(settings)}\n")


def test_a_message_that_was_not_taken_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], free_port: int
) -> None:
    monkeypatch.setenv("VPN_SENTINEL_WEBHOOK_URL", f"http://127.0.0.1:{free_port}/")
    assert main(["notify", "test", "webhook"]) == 1
    assert "VPN_SENTINEL_WEBHOOK_ALLOW_PRIVATE=true permits that" in capsys.readouterr().err
    monkeypatch.setenv("VPN_SENTINEL_WEBHOOK_ALLOW_PRIVATE", "true")
    assert main(["notify", "test", "webhook"]) == 1
    assert "the receiver cannot be reached: see that it runs" in capsys.readouterr().err


def test_a_channel_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^64$"):
        main(["notify", "test", "pigeon"])
    assert "'pigeon'" in capsys.readouterr().err
