"""The real program on databases as hosters and poolers give them: commands, a server, reports, deadlines."""

import contextlib
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.integration.program import EXIT, PROGRAM, Server
from tests.integration.test_durability import wait_until
from tests.server.test_database_address import hosted
from tests.server.test_pgbouncer import pooled

__all__ = ("hosted", "pooled")  # fixtures


def command(url: str, folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    settings = {"PATH": "/usr/bin:/bin", "VPN_SENTINEL_DATABASE_URL": url, "VPN_SENTINEL_DATA_DIR": str(folder)}
    return subprocess.run(
        [*PROGRAM, *words], env=settings | more, capture_output=True, text=True, check=False, timeout=60
    )


WORKS = {
    "require": "{url}?sslmode=require",
    "require, as a hoster's panel copies it": "{url}?sslmode=require&channel_binding=prefer&options=",
    "postgres://": "postgres://{rest}?sslmode=require",
    "verify-full": "{url}?sslmode=verify-full&sslrootcert={ca}",
    "two hosts, the first is gone": "postgresql://hosted:{password}@127.0.0.1:9,localhost:{port}/{name}?sslmode=require",
    "two hosts, for the one that takes writes": (
        "postgresql://hosted:{password}@localhost:{port},127.0.0.1:9/{name}?sslmode=require&target_session_attrs=read-write"
    ),
    "what a pooler's adapter adds": "{url}?sslmode=require&pgbouncer=true&connect_timeout=10",
    "SQLAlchemy's own spelling": "postgresql+asyncpg://{rest}?ssl=require",
    "a name of the application": "{url}?sslmode=require&application_name=vpn%20sentinel",
}


def filled(form: str, hosted: tuple[str, Path]) -> str:
    url, ca = hosted
    port, _, name = url.rpartition(":")[2].partition("/")
    rest = url.removeprefix("postgresql://")
    return form.format(url=url, rest=rest, ca=ca, port=port, name=name, password=quote("p@ss/#%", safe=""))


@pytest.mark.parametrize("form", WORKS.values(), ids=WORKS.keys())
def test_every_command_works_on_an_address_as_hosters_write_it(
    form: str, hosted: tuple[str, Path], tmp_path: Path
) -> None:
    url = filled(form, hosted)
    for words in (("db", "migrate"), ("db", "check"), ("token", "list")):
        done = command(url, tmp_path, *words)
        assert (done.returncode, done.stderr) == (0, ""), words


REFUSED = {
    "another driver's spelling": ("postgresql+psycopg2://{rest}?sslmode=require", "postgresql://USER"),
    "a parameter of another program": ("{url}?sslmode=require&schema=public", "'schema'"),
    "a mode of another driver": ("{url}?sslmode=no-verify", "sslmode"),
    "a password with a # in it": ("postgresql://hosted:p@ss/#%@localhost:{port}/{name}?sslmode=require", "#"),
    "nobody there": ("postgresql://hosted:{password}@127.0.0.1:9,127.0.0.1:10/{name}?sslmode=require", "refused"),
    "no TLS where it is asked for": ("{url}?sslmode=disable", "pg_hba.conf"),
}


@pytest.mark.parametrize(("form", "says"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("words", ["server", "db check", "token list"])
def test_what_does_not_work_is_one_line(
    form: str, says: str, words: str, hosted: tuple[str, Path], tmp_path: Path
) -> None:
    done = command(filled(form, hosted), tmp_path, *words.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert says in done.stderr
    assert "p@ss" not in done.stderr
    assert "Traceback" not in done.stderr


def test_what_an_address_asks_for_and_is_not_done_is_said(hosted: tuple[str, Path], tmp_path: Path) -> None:
    done = command(f"{hosted[0]}?sslmode=require&channel_binding=require", tmp_path, "db", "check")
    assert done.returncode == 0
    assert done.stderr == "the database's address asks for channel_binding=require, which is not checked here\n"


@pytest.mark.slow
def test_a_server_on_a_hosters_address_watches(hosted: tuple[str, Path], tmp_path: Path) -> None:
    with closing(Server(tmp_path, f"{hosted[0]}?sslmode=require")) as server:
        assert server.keepalive("nl", EXIT)[0] == 200
        assert server.state("nl") == "protected"
        assert server.ready()[0] == 200


@pytest.mark.slow
def test_a_server_behind_a_pooler_takes_all_reports_and_watches_deadlines(pooled: str, tmp_path: Path) -> None:
    """Many agents at once; then they stop, and each is silent when its time has come."""
    limits = {"VPN_SENTINEL_GRACE_RECOVERY": "0", "VPN_SENTINEL_CLIENT_TIMEOUT_MINUTES": "0.1"}
    with closing(Server(tmp_path, pooled, **limits)) as server:
        statuses: list[int] = []
        threads = [threading.Thread(target=_report, args=[server, f"old-{n}", statuses]) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert statuses == [200] * 80
        assert server.ready()[0] == 200
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: {server.state(f"old-{n}") for n in range(8)} == {"silent"}, 70, "all are silent")
        assert {server.state(f"old-{n}") for n in range(8)} == {"silent"}
        assert server.ready()[0] == 200
        said = server.said()
    for wrong in ("prepared statement", "Traceback", "ERROR", "cannot be stored", "not watched"):
        assert wrong not in said, said


def _report(server: Server, name: str, statuses: list[int]) -> None:
    for _ in range(10):
        statuses.append(server.keepalive(name, EXIT)[0])
        time.sleep(0.05)
