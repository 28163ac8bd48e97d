"""Tests that share a lab stay with one worker: else each worker makes the lab for itself."""

import re
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


def test_who_shares_a_lab_shares_a_worker(tmp_path: Path) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_sharing.py").write_text(SHARING)
    (tmp_path / "test_named.py").write_text(NAMED)
    command = [sys.executable, "-m", "pytest", "-v", "-n", "3", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    command += ["-c", str(TESTS.parent / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^\[(gw\d)\].* PASSED .*@(\S+)", done.stdout, re.MULTILINE)
    workers = {group: [worker for worker, there in found if there == group] for _, group in found}
    assert {group: (len(tests), len(set(tests))) for group, tests in workers.items()} == {
        "named": (3, 1),
        "test_sharing-wireguard": (3, 1),
        "test_sharing-openvpn": (3, 1),
    }, done.stdout
