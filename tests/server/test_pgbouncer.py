"""The store behind a real PgBouncer that gives each transaction another session."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest
from sqlalchemy import func, insert, select

from tests.conftest import Postgres, open_folder
from vpn_sentinel.server.access import create_token
from vpn_sentinel.server.notify import outbox as deliveries
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import meta, outbox, tunnels
from vpn_sentinel.server.store.store import Changes, Decide, Store, TunnelRow

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
CONFIG = """
[databases]
* = host={cluster} user=sentinel
[pgbouncer]
listen_addr =
unix_socket_dir = {folder}
listen_port = 6432
auth_type = any
pool_mode = {mode}
default_pool_size = {size}
server_check_query =
logfile = {folder}/log
"""


@pytest.fixture(params=[("transaction", 3), ("session", 20)], ids=lambda p: p[0])
def pooled(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[str]:
    """The address of an empty database behind PgBouncer."""
    if PGBOUNCER is None:
        pytest.skip("PgBouncer is not installed: `make test` as root installs it")
    mode, size = request.param
    direct = postgres.new_database()
    name, cluster = direct.partition("@/")[2].split("?host=")
    folder = open_folder("vs-pgb-")
    (folder / "config").write_text(CONFIG.format(cluster=cluster, folder=folder, mode=mode, size=size))
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(folder, "postgres")
    pooler = subprocess.Popen([*user, PGBOUNCER, str(folder / "config")], stderr=subprocess.DEVNULL)
    try:
        for _ in range(500):
            if (folder / ".s.PGSQL.6432").exists():
                break
            pooler.poll()
            assert pooler.returncode is None, (folder / "log").read_text()
            subprocess.run(["sleep", "0.01"], check=True)
        yield f"postgresql://sentinel@/{name}?host={folder}&port=6432"
    finally:
        pooler.terminate()
        pooler.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def store(pooled: str) -> AsyncIterator[Store]:
    opened = await open_store(pooled)
    yield opened
    await opened.close()


async def written(store: Store, names: Iterable[str], now: float, decide: Decide[Changes]) -> None:
    while names:  # what the others held for too long was left out
        names = (await store.transact(sorted(names), now, decide, create=True)).locked


async def test_reports_reads_and_deliveries_at_once(store: Store) -> None:
    """More work at once than there are sessions, of every kind that the server does."""

    def decide(found: Any) -> Changes:
        rows: dict[str, TunnelRow] = dict(found)
        return Changes(
            [("UPDATE tunnels SET seq = seq + 1, state = ? WHERE id = ?", [("down", r.id) for r in rows.values()])]
        )

    async def report(n: int) -> None:
        for turn in range(10):
            await written(store, {f"t{n % 4}", "shared"}, float(turn), decide)

    async def deliver(n: int) -> None:
        row = {"channel": f"c{n}", "tunnel": "nl", "kind": "leaking", "body": "{}", "created_at": 1.0, "due_at": 1.0}
        for _ in range(10):
            await store.write(insert(outbox).values({**row, "leased_until": 0.0, "attempt": 0}))
            [one] = await deliveries.lease(store, 2.0, 60.0, 1, f"c{n}")
            done = deliveries.DeliveryOutcome(result=deliveries.Result.DONE)
            await deliveries.settle(store, one, done, 2.0)

    async def look(n: int) -> None:
        for _ in range(10):
            await store.read(select(tunnels).where(tunnels.c.deadline <= float(n)))
            await store.read(select(meta.c.value).where(meta.c.key == "secret"))
            await store.ping()

    async with asyncio.TaskGroup() as group:
        for n in range(8):
            for work in (report, deliver, look):
                group.create_task(work(n))
    [[together]] = await store.read(select(tunnels.c.seq).where(tunnels.c.name == "shared"))
    [[told]] = await store.read(select(func.count()).select_from(outbox).where(outbox.c.outcome == "done"))
    assert (together, told) == (80, 80)


async def test_replicas_that_start_at_once_and_a_second_start(pooled: str) -> None:
    stores = await asyncio.gather(*(open_store(pooled) for _ in range(4)))
    try:
        assert await create_token(stores[0], "nl", shared=False, now=1.0)
    finally:
        for opened in stores:
            await opened.close()
