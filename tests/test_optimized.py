"""Under PYTHONOPTIMIZE=2, which saves an agent a megabyte, nothing is missing: no check is an assertion."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "vpn_sentinel"


def run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "PYTHONOPTIMIZE": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {f"VPN_SENTINEL_{name}": value for name, value in settings.items()}
    alone = ["unshare", "--user", "--net", "--map-root-user", sys.executable, "-m", "vpn_sentinel", *words]
    return subprocess.run(alone, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_assertions_tell_types_and_nothing_else() -> None:
    """An assertion is left out with all that stands in it."""
    found = {
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
        and any(isinstance(part, ast.Call) and ast.unparse(part.func) != "isinstance" for part in ast.walk(node))
    }
    assert found == set()


def test_check_judges_the_same() -> None:
    done = run("check", "--json")
    assert (done.returncode, done.stderr) == (4, "")
    assert [finding["code"] for finding in json.loads(done.stdout)["findings"]] == ["no_network"]


def test_what_cannot_be_used_is_refused_all_the_same(tmp_path: Path) -> None:
    done = run("server", WEBHOOK_URL="https://☃.example", DATA_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "VPN_SENTINEL_WEBHOOK_URL: names a host that is none by IDNA 2008" in done.stderr
