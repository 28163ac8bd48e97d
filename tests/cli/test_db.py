"""`db check`, `db backup` and `db restore`, as a person calls them."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.server.test_backup import full, rot, values, write
from vpn_sentinel.cli.main import main
from vpn_sentinel.server.store.sqlitefile import lock_file


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VPN_SENTINEL_DATA_DIR", str(tmp_path))
    return tmp_path / "sentinel.db"


def test_a_backup_is_made_and_put_back(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(database, "before")
    assert main(["db", "backup"]) == 0
    made = Path(capsys.readouterr().out.strip())
    assert made.parent == database.parent / "backups"
    write(database, "after")
    assert main(["db", "restore"]) == 0
    kept = f"{database}.replaced-1"
    assert capsys.readouterr() == (f"{database} is {made} now; what it was is kept as {kept}\n", "")
    assert values(database) == {"before"}
    assert main(["db", "restore", kept]) == 0
    assert values(database) == {"before", "after"}


def test_it_may_be_kept_elsewhere(database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(database, "before")
    elsewhere = tmp_path / "another disk"
    assert main(["db", "backup", "--backup-dir", str(elsewhere)]) == 0
    assert Path(capsys.readouterr().out.strip()).parent == elsewhere


def test_without_a_backup_there_is_nothing_to_put_back(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(database, "before")
    assert main(["db", "restore"]) == 1
    assert capsys.readouterr().err == f"vpn-sentinel: {database.parent}/backups holds no backup\n"


def test_under_a_server_nothing_is_put_back(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(database, "before")
    assert main(["db", "backup"]) == 0
    server = lock_file(database)
    assert server is not None
    assert main(["db", "restore"]) == 1
    server.release()
    assert capsys.readouterr().err == f"vpn-sentinel: database {database} is in use: stop the server first\n"


def test_damage_is_said_with_what_to_do(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full(database)
    assert main(["db", "check"]) == 0
    rot(database)
    assert main(["db", "check"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"vpn-sentinel: database {database} is damaged: ")
    assert said.endswith("there is no backup to put back: move the file and its -wal away, and start anew\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["db check", "db migrate", "token list"])
def test_what_is_no_database_any_more_can_be_put_back(
    command: str, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(database, "before")
    assert main(["db", "backup"]) == 0
    made = capsys.readouterr().out.strip()
    database.write_bytes(b"rotten" + database.read_bytes()[6:])
    assert main(command.split()) == 1
    said = f"vpn-sentinel: database {database}: file is not a database; "
    said += f"stop the server, then `vpn-sentinel db restore` puts back {made} of "
    assert capsys.readouterr().err.startswith(said)
    assert main(["db", "restore"]) == 0
    assert values(database) == {"before"}


@pytest.mark.parametrize("verb", ["backup", "restore"])
def test_postgres_has_its_own_ways(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["db", verb, "--database-url", "postgresql://nobody@127.0.0.1:9/x"]) == 1
    said = (
        "vpn-sentinel: backups of a PostgreSQL database are made and put back by its own tools (pg_dump, pg_restore)\n"
    )
    assert capsys.readouterr().err == said


def test_check_changes_nothing_that_is_whole(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(database, "before")
    before = database.read_bytes()
    assert main(["db", "check"]) == 0
    assert capsys.readouterr() == ("tunnels: 0\nobservations: 0\nincidents: 0\noutbox: 0\n", "")
    assert database.read_bytes() == before
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
