"""Every command where people start it: without a user entry, home, folder, streams, /proc, signals or room on disk."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.users import as_user
from tests.integration.test_durability import wait_until
from vpn_sentinel.cli.main import main

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user or mounts: needs root")
PROGRAM = [sys.executable, "-m", "vpn_sentinel"]
# A user without an entry in passwd(5), as `docker run --user 12345`. The capability is for the interpreter alone,
# which may stand in somebody's home.
NOBODY = [
    "setpriv", "--reuid=12345", "--regid=12345", "--clear-groups",
    "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search",
]  # fmt: skip
LOOKING = ["doctor", "check"]
QUICK = ["geo show", "token list", "tunnel list", "db check", "notify test webhook", "--version"]
SOME = [*LOOKING, "token list", "--version"]
STARTING = ["agent --url http://127.0.0.1:9", "server", "up", "token create x", "db migrate"]


def run(words: Sequence[str], *, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "PYTHON": sys.executable, **settings}
    return subprocess.run(list(words), env=env, capture_output=True, text=True, timeout=60, check=False, cwd=cwd)


def shell(script: str, *, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    return run(["sh", "-c", program_in(script)], cwd=cwd, **settings)


def program_in(script: str) -> str:
    """`script` with PROGRAM written out so that a shell within a shell takes it, whatever is in its path."""
    return script.replace("PROGRAM", '"$PYTHON" -m vpn_sentinel')


END = "kill $! && wait $!; ended=$?; cat log; exit $ended"  # of a program in the background, and what it said to `log`


def ends_in_words(done: subprocess.CompletedProcess[str]) -> None:
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr
    assert 0 <= done.returncode < 120, done


# --- a numeric user ---


@ROOT
@pytest.mark.parametrize("home", [{}, {"HOME": "/nonexistent"}], ids=["no HOME", "a HOME that is not there"])
@pytest.mark.parametrize("command", [*LOOKING, *QUICK])
def test_a_user_without_an_entry_looks(command: str, home: dict[str, str], tmp_path: Path) -> None:
    done = run([*NOBODY, *PROGRAM, *command.split()], cwd=tmp_path, **home)
    ends_in_words(done)
    if command in LOOKING:
        assert done.stdout
    elif "db" in command or "list" in command:
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)


TUNNEL = """
ip link set lo up
ip link add eth0 type veth peer name far0; ip link set far0 up; ip link set eth0 up
ip link add wg0 type veth peer name far1; ip link set far1 up; ip link set wg0 up
ip addr add 192.168.7.2/24 dev eth0; ip addr add 10.8.0.2/24 dev wg0
ip route add default via 192.168.7.1; ip route add 0.0.0.0/1 dev wg0; ip route add 128.0.0.0/1 dev wg0
"""


@ROOT
@pytest.mark.parametrize("command", ["doctor", "check", "agent --url http://127.0.0.1:9"])
def test_a_user_without_an_entry_beside_a_tunnel(command: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    started = f"{' '.join(NOBODY)} --reset-env env VPN_SENTINEL_API_KEY=kkkkkkkk VPN_SENTINEL_TUNNEL_INTERFACE=wg0"
    script = f"{TUNNEL} exec {started} VPN_SENTINEL_DATA_DIR='{tmp_path}' timeout 9 PROGRAM {command}"
    done = run(["unshare", "--net", "sh", "-c", program_in(script)])
    if done.returncode == 124:  # the agent, which runs until it is stopped
        done.returncode = 0
    ends_in_words(done)
    assert {"doctor": "uid 12345", "check": "wg0, up", "agent": "agent started"}[command.split()[0]] in (
        done.stdout + done.stderr
    )


@ROOT
@pytest.mark.parametrize("command", STARTING)
def test_a_user_without_an_entry_is_told_which_setting_names_a_folder(command: str) -> None:
    done = run([*NOBODY, *PROGRAM, *command.split()], VPN_SENTINEL_API_KEY="k" * 8)
    ends_in_words(done)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("vpn-sentinel: VPN_SENTINEL_DATA_DIR: ")


@ROOT
def test_a_user_without_an_entry_works_in_the_folder_that_is_set(open_path: Path) -> None:
    data, aside = open_path / "data", open_path / "aside"
    data.mkdir()
    aside.mkdir()
    os.chown(data, 12345, 12345)
    started = [*as_user(12345, aside), *PROGRAM]
    for command in ("token create x", "token list", "db check"):
        done = run([*started, *command.split()], VPN_SENTINEL_DATA_DIR=str(data))
        assert (done.returncode, done.stderr) == (0, ""), command


# --- folders and file systems ---


@pytest.mark.parametrize("command", [*LOOKING, "token list", "geo show"])
@pytest.mark.parametrize("data", ["data", ""])
def test_a_working_directory_that_was_removed(command: str, data: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd '{gone}'; rmdir '{gone}'; exec PROGRAM {command}"
    ends_in_words(shell(script, VPN_SENTINEL_DATA_DIR=data or str(tmp_path)))


@ROOT
@pytest.mark.parametrize("command", [*SOME, "token create x"])
@pytest.mark.parametrize("proc", ["umount -l /proc", "mount -t tmpfs none /proc"], ids=["not mounted", "empty"])
def test_without_proc(command: str, proc: str, tmp_path: Path) -> None:
    script = f"unshare -m sh -c '{proc}; exec PROGRAM {command}'"
    ends_in_words(done := shell(script, VPN_SENTINEL_DATA_DIR=str(tmp_path)))
    assert done.returncode == 0 or "create" not in command


@ROOT
@pytest.mark.parametrize("disk", [b"m\xe9xico", b"a b", "a\xa0b".encode()], ids=["Latin-1", "a space", "another space"])
def test_beside_a_disk_whatever_it_is_called(disk: bytes, tmp_path: Path) -> None:
    (folder := tmp_path / os.fsdecode(disk)).mkdir()
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder)]
    done = run([*mount, *PROGRAM, "token", "create", "x"], VPN_SENTINEL_DATA_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


@ROOT
@pytest.mark.parametrize("command", [*LOOKING, *QUICK, *STARTING])
def test_where_nothing_can_be_written(command: str) -> None:
    folders = ("/tmp", "/var/tmp", "/var/lib", "/dev/shm", "/run")
    # The folders as they are, read-only: the program itself may lie in one of them.
    mounts = "; ".join(f"mount --bind {f} {f} && mount -o remount,bind,ro {f}" for f in folders)
    script = f"unshare -m sh -c '{mounts}; cd /; exec PROGRAM {command}'"
    done = shell(script, VPN_SENTINEL_DATA_DIR="/var/lib/vpn-sentinel", VPN_SENTINEL_API_KEY="k" * 8)
    ends_in_words(done)
    if command in STARTING:
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "VPN_SENTINEL_DATA_DIR" in done.stderr


# --- standard streams ---


@pytest.mark.parametrize("command", SOME)
@pytest.mark.parametrize("closed", ["0<&- 1>&- 2>&-", "0<&- 1>&-", "2>&-"])
def test_streams_that_are_closed(command: str, closed: str, tmp_path: Path) -> None:
    done = shell(f"exec PROGRAM {command} {closed}", VPN_SENTINEL_DATA_DIR=str(tmp_path))
    ends_in_words(done)


@ROOT
@pytest.mark.parametrize(("command", "status"), [("doctor", 1), ("check", 4), ("check --json", 4)])
def test_an_output_whose_encoding_lacks_our_signs(command: str, status: int, tmp_path: Path) -> None:
    """A locale of Latin-1 or ASCII that is taken at its word. 1 would be the status of a tunnel that is degraded."""
    words = ["unshare", "--net", *PROGRAM, *command.split()]
    done = run(words, PYTHONIOENCODING="ascii", VPN_SENTINEL_DATA_DIR=str(tmp_path))
    ends_in_words(done)
    assert (done.returncode, done.stderr) == (status, "")


def test_no_file_of_ours_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Else a line for people would be written into the database."""
    done = shell(
        "PROGRAM db migrate 0<&- 1>&- 2>&- && PROGRAM token create x 0<&- 1>&- 2>&- && PROGRAM db check",
        VPN_SENTINEL_DATA_DIR=str(tmp_path),
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_first_key_that_nobody_saw_is_told_in_the_log(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [str(s.getsockname()[1]) for s in (one, two)]
    done = shell(
        f"PROGRAM server >/dev/full 2>log & until grep -q 'server started' log; do sleep 0.1; done; {END}",
        VPN_SENTINEL_DATA_DIR=str(tmp_path), VPN_SENTINEL_SERVER_API_PORT=ports[0],
        VPN_SENTINEL_SERVER_HEALTH_PORT=ports[1], VPN_SENTINEL_SERVER_WEB_DASHBOARD_ENABLED="false",
        cwd=tmp_path,
    )  # fmt: skip
    ends_in_words(done)
    assert 'by="vpn-sentinel token create NAME --shared"' in done.stdout


@pytest.mark.parametrize("command", ["doctor", "geo show"])
def test_output_that_cannot_be_kept_is_said(command: str, tmp_path: Path) -> None:
    done = shell(f"exec PROGRAM {command} >/dev/full", VPN_SENTINEL_DATA_DIR=str(tmp_path))
    said = "vpn-sentinel: what is printed or kept: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


# --- signals ---

# What a parent may leave: SIGINT ignored as by a shell for what it starts with `&`, or anything blocked.
LEFT = """
import os, signal, sys
for number in sys.argv[1].split():
    signal.signal(int(number), signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, map(int, sys.argv[2].split()))
os.execv(sys.argv[3], sys.argv[3:])
"""
ALONE = ["unshare", "--user", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@contextmanager
def started(folder: Path, command: str, *, ignored: str = "", blocked: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A server or an agent in a network namespace of its own, once it says that it has started."""
    settings = {"VPN_SENTINEL_DATA_DIR": str(folder), "VPN_SENTINEL_API_KEY": "k" * 8}
    words = [*ALONE, sys.executable, "-c", LEFT, ignored, blocked, *PROGRAM, *command.split()]
    with (log := folder / "log").open("wb") as said:
        process = subprocess.Popen(words, env={"PATH": os.environ["PATH"], **settings}, stdout=said, stderr=said)
    try:
        wait_until(lambda: process.poll() is not None or b" started" in log.read_bytes(), 30, "it starts")
        assert process.poll() is None, log.read_bytes()
        yield process
    finally:
        process.kill()
        process.wait()


RUNNING = ["server", "agent --url http://127.0.0.1:9"]  # on uvloop, and on asyncio's own loop


@pytest.mark.parametrize("command", RUNNING)
@pytest.mark.parametrize("left", ["ignored", "blocked"])
def test_sigterm_ends_it_though_its_parent_would_not_be_ended(command: str, left: str, tmp_path: Path) -> None:
    with started(tmp_path, command, **{left: str(signal.SIGTERM.value)}) as process:
        process.terminate()
        assert process.wait(15) == 0


@pytest.mark.parametrize("command", RUNNING)
def test_in_the_background_ctrl_c_is_not_meant_for_it(command: str, tmp_path: Path) -> None:
    with started(tmp_path, command, ignored=str(signal.SIGINT.value)) as process:
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.terminate()
        assert process.wait(15) == 0


@pytest.mark.parametrize("command", RUNNING)
def test_in_the_foreground_it_is(command: str, tmp_path: Path) -> None:
    with started(tmp_path, command) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0


def test_how_a_hook_ended_is_known_where_children_were_ignored() -> None:
    program = """
import asyncio
from vpn_sentinel.cli.process import run_until_stopped
async def work(stop):
    print(await (await asyncio.create_subprocess_exec("sh", "-c", "exit 3")).wait())
run_until_stopped(work, fast=False)
"""
    done = run([sys.executable, "-c", LEFT, str(signal.SIGCHLD.value), "", sys.executable, "-c", program])
    assert (done.stdout, done.stderr) == ("3\n", "")


# --- low limits ---


@pytest.mark.parametrize("files", [8, 20, 24])
@pytest.mark.parametrize("command", ["server", "agent --url http://127.0.0.1:9", "check", "token list"])
def test_too_few_open_files_are_said_in_a_line(command: str, files: int, tmp_path: Path) -> None:
    done = shell(f"ulimit -n {files}; exec PROGRAM {command}", VPN_SENTINEL_DATA_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"vpn-sentinel: only {files} open files are allowed (ulimit -n), 32 are needed\n"


LACKING = {
    "open files, in a group of errors": (
        ExceptionGroup("unhandled", [ExceptionGroup("more", [OSError(errno.EMFILE, "Too many open files")])]),
        "too many open files",
    ),
    "threads": (RuntimeError("can't start new thread"), "no thread can be started"),
    "memory": (MemoryError(), "there is not enough memory"),
    "room on a disk": (OSError(errno.ENOSPC, "No space left on device"), "what is printed or kept: No space left"),
}


@pytest.mark.parametrize(("error", "said"), LACKING.values(), ids=LACKING.keys())
def test_what_a_limit_takes_away_is_said_in_a_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_words: list[str]) -> int:
        raise error

    monkeypatch.setattr("vpn_sentinel.cli.main._main", fail)
    assert main([]) == 1
    assert capsys.readouterr().err.startswith(f"vpn-sentinel: {said}")


def test_a_defect_is_none_of_these(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_words: list[str]) -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr("vpn_sentinel.cli.main._main", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main([])
