"""The commands where only the agent's packages are installed."""

import subprocess
import sys

import pytest

from tests.test_imports import HEAVY

# Hides packages that are there, then runs a command: what None stands for cannot be imported.
CODE = """
import sys
hidden, *words = sys.argv[1:]
sys.modules.update(dict.fromkeys(hidden.split(",")))
from vpn_sentinel.cli.main import main
sys.exit(main(words))
"""
NEED_THEM = [
    "up", "server", "notify test telegram", "token list", "token create x", "token revoke x", "tunnel list",
    "tunnel show x", "db check", "db migrate",
]  # fmt: skip


def run(command: str, hidden: set[str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", CODE, ",".join(sorted(hidden)), *command.split()]
    return subprocess.run(words, env={}, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("command", NEED_THEM)
def test_that_they_are_missing_is_one_line(command: str) -> None:
    done = run(command, HEAVY)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    name = command.partition(" ")[0]
    assert done.stderr.startswith(f"vpn-sentinel: {name} needs the server's packages (")


def test_one_that_is_missing_is_named() -> None:
    assert run("up", {"prometheus_client"}).stderr == (
        "vpn-sentinel: up needs the server's packages (prometheus_client is missing)\n"
    )


@pytest.mark.parametrize("command", [*NEED_THEM, "notify", "token", "tunnel", "db"])
def test_help_needs_none(command: str) -> None:
    done = run(f"{command} --help", HEAVY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
