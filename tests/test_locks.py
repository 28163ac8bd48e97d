"""What is locked is all that runs: agent and server where nothing but their locked packages can be imported."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_packages import CODE
from tests.server.test_doors import KEYS, TABLE, Running, chosen, filled_in

ROOT = Path(__file__).parent.parent
KEY = "locked-key-0123456789"


def locked(name: str) -> set[str]:
    text = (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8")
    return {canonical(found) for found in re.findall(r"(?m)^([A-Za-z0-9._-]+)", text)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def others(lock: str) -> str:
    """The import names of all that is installed here and not in the lock."""
    known = locked(lock) | {"vpn-sentinel"}
    found = {
        name
        for name, owners in packages_distributions().items()
        if name.isidentifier() and not known & {canonical(owner) for owner in owners}
    }
    return ",".join(sorted(found))


def words(lock: str, *command: str) -> list[str]:
    return [sys.executable, "-c", CODE, others(lock), *command]


def test_what_is_hidden_is_what_is_not_locked() -> None:
    assert {"faker", "polyfactory", "rich", "rich_click", "litestar_htmx", "pytest"} <= set(others("server").split(","))
    assert {"litestar", "sqlalchemy", "httpx", "rich"} <= set(others("agent").split(","))
    assert not {"litestar", "msgspec", "vpn_sentinel"} & set(others("server").split(","))


@pytest.mark.parametrize("command", ["check", "doctor"])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_agents_lock_is_all_that_a_look_needs(command: str, form: list[str]) -> None:
    alone = ["unshare", "--user", "--net", "--map-root-user", *words("agent", command, *form)]
    done = subprocess.run(
        alone, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.returncode == {"check": 4, "doctor": 1}[command]


def test_the_agents_lock_is_all_that_the_agent_imports() -> None:
    code = """if True:
        import sys, pkgutil, importlib
        sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))
        from vpn_sentinel import agent, domain, runtime, wire
        for package in (agent, domain, runtime, wire):
            for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                importlib.import_module(found.name)
    """
    subprocess.run([sys.executable, "-c", code, others("agent")], check=True, timeout=60)


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Running]:
    config = chosen(folder)
    settings = {
        "API_KEY": KEY, "DATA_DIR": str(folder), "SERVER_HOST": "127.0.0.1", "SERVER_API_PORT": config.api_port,
        "SERVER_HEALTH_HOST": "127.0.0.1", "SERVER_HEALTH_PORT": config.health_port,
        "SERVER_DASHBOARD_PORT": config.dashboard_port, "TRACE_URL": "http://127.0.0.1:9",
        "TRUSTED_PROXIES": "127.0.0.1",
    }  # fmt: skip
    env = {"PATH": os.environ["PATH"], **{f"VPN_SENTINEL_{name}": str(value) for name, value in settings.items()}}
    process = await asyncio.create_subprocess_exec(
        *words("server", "server"), env=env, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    ports = {"api": config.api_port, "health": config.health_port, "dashboard": config.dashboard_port}
    running = Running(ports, {KEYS[0]: None, KEYS[2]: KEY})
    try:
        async with asyncio.timeout(30):
            while not await ready(running):
                assert process.returncode is None, await process.stderr.read()  # type: ignore[union-attr]
                await asyncio.sleep(0.1)
        yield running
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(20):
            _, told = await process.communicate()
        assert b"Traceback" not in told, told.decode()


async def ready(running: Running) -> bool:
    try:
        return await running.status("health", "GET", "/health/ready") == 200
    except OSError:
        return False


async def test_the_servers_lock_is_all_that_its_routes_need(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        answer = await running.ask("api", "GET", "/api/v1/schema/openapi.json")
        described: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["paths"]
        assert set(described) <= set(TABLE["api"])
        assert await running.status("api", "POST", "/api/v1/keepalive", key=KEYS[2]) == 200
        wrong = {}
        for port, rows in TABLE.items():
            for path, row in rows.items():
                method = "GET" if row["GET"] != row["PUT"] else "POST"
                if (found := await running.status(port, method, filled_in(path), key=KEYS[2])) != 200:
                    wrong[port, path] = found
        assert wrong == {}


@pytest.mark.parametrize("name", ["agent", "server"])
def test_each_locked_package_is_explained_and_no_other(name: str) -> None:
    page = (ROOT / "docs" / "reference" / "packages.md").read_text(encoding="utf-8")
    rows = page if name == "server" else page.partition("## The server")[0]
    assert set(re.findall(r"(?m)^\| `([a-z0-9-]+)` \|", rows)) == locked(name)


def test_what_is_left_out_is_not_locked() -> None:
    text = (ROOT / "requirements" / "unneeded.txt").read_text(encoding="utf-8")
    left_out = {canonical(found) for found in re.findall(r"(?m)^([a-z-]+) +# ", text)}
    assert left_out
    assert not (left_out | {"faker"}) & (locked("server") | locked("agent"))
