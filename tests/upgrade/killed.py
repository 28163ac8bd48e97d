"""Opens databases and kills itself in the middle: `python -m tests.upgrade.killed`, a line of standard input a try.

`HOW STATEMENT URL`: a fork opens the database at URL and dies by SIGKILL before it has run that statement, counted from
1. The answer is a line: "killed", "opened" or "failed". HOW is "now", or "before" for the way of earlier builds on
SQLite, in which Python began the transaction, and each CREATE before that was one of its own.
"""

import asyncio
import itertools
import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event

import vpn_sentinel.server.store as store_package
from vpn_sentinel.server.store.open import open_store

MIGRATIONS = Path(store_package.__file__).parent / "migrations"


def main() -> None:
    for line in sys.stdin:
        how, statement, url = line.rstrip("\n").split(maxsplit=2)  # a path in it may have spaces
        child = os.fork()
        if child == 0:
            kill_before(int(statement), sqlite=url.startswith("sqlite:"))
            opens = open_as_before if how == "before" else open_now
            try:
                opens(url)
            except Exception as e:  # noqa: BLE001 - whatever it is, it is no kill
                print(e, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ended = "killed" if os.WIFSIGNALED(status) else "opened" if os.WEXITSTATUS(status) == 0 else "failed"
        print(ended, flush=True)


def kill_before(statement: int, *, sqlite: bool) -> None:
    left = itertools.count(statement - 1, -1)

    def ran(*_: Any, **__: Any) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    connect = sqlite3.connect

    def traced(*words: Any, **named: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*words, **named)
        connection.set_trace_callback(ran)
        return connection

    if sqlite:
        sqlite3.connect = sqlite3.dbapi2.connect = traced  # type: ignore[assignment] # whoever opens it: SQLAlchemy takes the second
    else:
        event.listen(Engine, "before_cursor_execute", ran)
        event.listen(Engine, "commit", ran)


def open_now(url: str) -> None:
    async def run() -> None:
        await (await open_store(url)).close()

    asyncio.run(run())


def open_as_before(url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with create_engine(url).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


if __name__ == "__main__":
    main()
