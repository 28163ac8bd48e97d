"""What a command may pull in: the agent owes a small footprint, and pydantic must stay out altogether."""

import subprocess
import sys

import pytest

HEAVY = {"sqlalchemy", "alembic", "litestar", "uvicorn", "uvloop", "httpx", "jinja2", "prometheus_client", "asyncpg"}
NOT_THE_AGENTS = {
    "pydantic", "rich", "email", "importlib.metadata", "zipfile", "ctypes", "tomllib", "unicodedata", "h11",
    "vpn_sentinel.agent.remedies.remedies", "vpn_sentinel.agent.doctor", "vpn_sentinel.agent.geo.fetch",
}  # fmt: skip
MODULES = {
    "the agent": ("vpn_sentinel.agent.app", HEAVY | NOT_THE_AGENTS),
    "the agent's command": ("vpn_sentinel.cli.agent", HEAVY | {"pydantic", "rich"}),
    "the server's settings, which every command asks about names it does not know": (
        "vpn_sentinel.server.settings",
        HEAVY,
    ),
    "check": ("vpn_sentinel.cli.check", HEAVY | {"pydantic", "rich"}),
    "doctor": ("vpn_sentinel.cli.doctor", HEAVY | {"pydantic", "rich"}),
    "the list of commands": ("vpn_sentinel.cli.main", HEAVY | {"pydantic", "rich", "msgspec"}),
    "the server": ("vpn_sentinel.server.app", {"pydantic", "websockets.asyncio.client"}),
}


@pytest.mark.parametrize(("module", "banned"), MODULES.values(), ids=MODULES.keys())
def test_importing(module: str, banned: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & banned == set()


def test_looking_an_ascii_name_up_loads_no_idna_tables() -> None:
    code = """if True:
        import sys
        from vpn_sentinel.agent.net.resolver import system_lookup
        from vpn_sentinel.runtime.urls import is_host
        assert is_host("localhost"), system_lookup("localhost")
        assert "encodings.idna" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_a_geo_database_brings_neither_multiprocessing_nor_its_own_version_along() -> None:
    """Both would cost the agent 2 MB; who wants them afterwards gets the real ones."""
    code = """if True:
        import sys
        from vpn_sentinel.agent.probes import mmdb
        try:
            mmdb.open_file("/dev/null")
        except ValueError:
            pass
        assert "maxminddb.reader" in sys.modules
        assert not {"multiprocessing", "importlib.metadata", "email", "zipfile"} & set(sys.modules)
        from importlib.metadata import version
        from multiprocessing import Lock
        assert version("maxminddb") and Lock()
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_agents_websocket_brings_no_second_http_along() -> None:
    """It would cost a third of a megabyte; who wants it afterwards gets the real one."""
    code = """if True:
        import sys
        from vpn_sentinel.agent.uplink import websocket
        assert "wsproto.frame_protocol" in sys.modules and "h11" not in sys.modules
        import h11
        assert h11.Connection(h11.CLIENT)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_loaded_already_is_not_replaced() -> None:
    code = """if True:
        import h11, wsproto
        from vpn_sentinel.agent.uplink import websocket
        assert sys.modules["h11"] is h11 and wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    """
    subprocess.run([sys.executable, "-c", "import sys\n" + code], check=True)
