"""A run of several workers: who shares a lab shares a worker, and what was tried again is named at the end."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
SHARING = """
import pytest

@pytest.mark.acceptance
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kind", ["wireguard", "openvpn"])
def test_something(kind, number):
    pass
"""
NAMED = """
import pytest

pytestmark = [pytest.mark.acceptance, pytest.mark.xdist_group("named")]

@pytest.mark.parametrize("kind", ["wireguard", "openvpn", "strongswan"])
def test_something(kind):
    pass
"""


LATE = """
from pathlib import Path
import pytest

@pytest.mark.acceptance
@pytest.mark.parametrize("kind", ["wireguard", "openvpn"])
def test_late(kind):
    tried = Path(__file__).with_name(f"{kind}-tried")
    if kind == "openvpn" and not tried.exists():
        tried.touch()
        raise AssertionError("the lab was late")
"""


def run(folder: Path, *options: str, **tests: str) -> str:
    """What pytest prints of `tests`, each the text of a module, with this tree's conftest and some workers."""
    shutil.copy(TESTS / "conftest.py", folder)
    for name, text in tests.items():
        (folder / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider"]
    command += ["-c", str(TESTS.parent / "pyproject.toml"), "--rootdir", str(folder), str(folder)]
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def options_of(target: str) -> list[str]:
    """How the Makefile calls pytest for `target`, after `-m pytest`."""
    made = subprocess.run(
        ["make", "-n", "-C", str(TESTS.parent), target, "LABS=2"], capture_output=True, text=True, check=True
    )
    (line,) = [line for line in made.stdout.splitlines() if "-m pytest" in line]
    return shlex.split(line.partition("-m pytest")[2])


def test_what_was_tried_again_is_named_in_the_last_line(tmp_path: Path) -> None:
    said = run(tmp_path, *options_of("acceptance"), test_late=LATE)
    last = said.rstrip().splitlines()[-1]
    assert re.fullmatch(r"2 passed, 1 rerun \(test_late\.py::test_late\[openvpn\]\) in [\d.]+s", last), said
    assert "RERUN test_late.py::test_late[openvpn]" in said


def test_where_nothing_was_the_last_line_is_short(tmp_path: Path) -> None:
    said = run(tmp_path, *options_of("acceptance"), test_sharing=SHARING)
    assert re.fullmatch(r"6 passed in [\d.]+s", said.rstrip().splitlines()[-1]), said


def test_who_shares_a_lab_shares_a_worker(tmp_path: Path) -> None:
    said = run(tmp_path, "-v", "-n", "3", "--dist", "loadgroup", test_sharing=SHARING, test_named=NAMED)
    found = re.findall(r"^\[(gw\d)\].* PASSED .*@(\S+)", said, re.MULTILINE)
    workers = {group: [worker for worker, there in found if there == group] for _, group in found}
    assert {group: (len(tests), len(set(tests))) for group, tests in workers.items()} == {
        "named": (3, 1),
        "test_sharing-wireguard": (3, 1),
        "test_sharing-openvpn": (3, 1),
    }, said
