"""Commands of the owner's, with real processes."""

import asyncio
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import open_folder
from vpn_sentinel.agent.remedies.failure import RemedyError
from vpn_sentinel.agent.remedies.hook import MAX_OUTPUT_BYTES, run_hook, who_else_can_write, without_own_settings

ENV = {"PATH": "/usr/bin:/bin"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_it_gets_json_and_its_output_comes_back() -> None:
    code = "import json, sys; print(json.load(sys.stdin)['state'])"
    assert await run_hook(python(code), json.dumps({"state": "leaking"}).encode(), ENV, 5) == "leaking"


async def test_one_that_reads_nothing_is_no_trouble() -> None:
    assert await run_hook(["/bin/true"], b"x" * 1_000_000, ENV, 5) == ""


async def test_a_failure_names_the_status_and_the_last_words() -> None:
    code = "import sys; print('one', flush=True); print('no such client', file=sys.stderr); sys.exit(3)"
    with pytest.raises(RemedyError, match="status 3: no such client"):
        await run_hook(python(code), b"{}", ENV, 5)


@pytest.mark.parametrize("command", ["/no/such/program", "/etc/passwd"])
async def test_what_cannot_be_started_says_so(command: str) -> None:
    with pytest.raises(RemedyError, match="cannot be started"):
        await run_hook([command], b"{}", ENV, 5)


async def test_much_output_is_read_and_little_is_kept() -> None:
    code = "import sys; sys.stdout.write('x' * 5_000_000)"
    assert await run_hook(python(code), b"{}", ENV, 20) == "x" * MAX_OUTPUT_BYTES


async def test_control_characters_do_not_reach_the_log() -> None:
    assert await run_hook(python(r"print('a\x1b[31mb')"), b"{}", ENV, 5) == "a?[31mb"


async def test_after_its_time_the_whole_group_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    # A shell, which is up long before its time is over.
    script = f"sleep 60 & echo $$ $! > {shlex.quote(str(pids))}; wait"
    with pytest.raises(RemedyError, match="longer than 1 s and was killed"):
        await run_hook(["/bin/sh", "-c", script], b"{}", ENV, 1)
    end = time.monotonic() + 5
    while any(_lives(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < end, "the command or its child lives"


def _lives(pid: int) -> bool:
    """Running: one that waits to be reaped by somebody else is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_what_it_leaves_running_in_time_does_not_hold_us_up() -> None:
    code = "import subprocess; p = subprocess.Popen(['sleep', '30']); print(p.pid)"
    async with asyncio.timeout(5):
        pid = int(await run_hook(python(code), b"{}", ENV, 4))
    assert _lives(pid)
    os.kill(pid, 9)


async def test_its_environment_holds_none_of_our_settings() -> None:
    ours = {"VPN_SENTINEL_API_KEY": "k", "VPN_SENTINEL_QBITTORRENT_PASSWORD": "p", "TELEGRAM_BOT_TOKEN": "t"}
    environment = without_own_settings({**ENV, **ours, "HOME": "/root"})
    output = await run_hook(python("import os; print(sorted(os.environ))"), b"{}", environment, 5)
    assert "HOME" in output
    assert "SENTINEL" not in output
    assert "TELEGRAM" not in output


# --- who else decides what it does ------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A command that is nobody else's to write, in `tmp_path`/etc."""
    made = tmp_path / "etc" / "on-change"
    made.parent.mkdir(mode=0o755)
    made.write_text("#!/bin/sh\necho ran\n")
    made.chmod(0o755)
    return made


async def test_one_that_is_ours_alone_runs(script: Path) -> None:
    assert who_else_can_write([str(script)]) is None
    assert await run_hook([str(script)], b"{}", ENV, 5) == "ran"


@pytest.mark.parametrize(
    ("of", "mode", "who"),
    [
        ("on-change", 0o757, "everybody"),
        ("on-change", 0o775, "its group"),
        ("", 0o777, "everybody"),
        ("", 0o775, "its"),
    ],
)
async def test_what_others_may_write_is_not_run(script: Path, of: str, mode: int, who: str) -> None:
    (script.parent / of).chmod(mode)
    with pytest.raises(
        RemedyError, match=rf"is not run, for others may change it: /.+/etc{of and '/'}{of} can .* {who}"
    ):
        await run_hook([str(script)], b"{}", ENV, 5)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("of", ["on-change", "", ".."])
async def test_what_belongs_to_another_user_is_not_run(script: Path, of: str) -> None:
    os.chown(script.parent / of, 1234, -1)
    with pytest.raises(RemedyError, match="belongs to user 1234"):
        await run_hook([str(script)], b"{}", ENV, 5)


@pytest.mark.parametrize("target", ["{open}/real", "../open/real"])
def test_a_link_is_judged_by_where_it_leads(script: Path, tmp_path: Path, target: str) -> None:
    other = tmp_path / "open"
    other.mkdir()
    (other / "real").write_text("#!/bin/sh\n")
    script.unlink()
    script.symlink_to(target.format(open=other))
    (other / "real").chmod(0o755)
    assert who_else_can_write([str(script)]) is None
    other.chmod(0o777)
    assert who_else_can_write([str(script)]) == f"{other} can be written by everybody"
    other.chmod(0o1777)  # as /tmp: nobody can put another file in the place of ours
    assert who_else_can_write([str(script)]) is None


def test_links_in_a_circle_end(script: Path) -> None:
    script.unlink()
    script.symlink_to(script)
    with pytest.raises(OSError, match="Too many levels"):
        who_else_can_write([str(script)])


@pytest.mark.parametrize("name", ["on-change", "on change"])
def test_the_script_of_an_interpreter_is_judged_too(script: Path, name: str) -> None:
    script = script.rename(script.with_name(name))
    script.chmod(0o666)
    for words in (
        ["/bin/sh", str(script)],
        ["/usr/bin/env", "-i", "sh", str(script)],
        [sys.executable, "-I", str(script)],
    ):
        assert who_else_can_write(words) == f"{script} can be written by everybody", words
    assert who_else_can_write(["/bin/cat", str(script)]) is None, "what it reads is no program"


def test_of_a_shells_line_the_program_is_judged() -> None:
    folder = open_folder("vs-hook-")
    try:
        (script := folder / "on-change").touch(0o755)
        line = f"{script} {'x' * 300}"  # longer than a file's name may be
        assert who_else_can_write(["/bin/sh", "-c", line]) is None
        script.chmod(0o777)
        assert who_else_can_write(["/bin/sh", "-c", line]) == f"{script} can be written by everybody"
    finally:
        shutil.rmtree(folder)
