"""kill -9 at every step of the server, on both engines: is anything lost, does it start again?

    python -m bench kills [--kills 1000] [--parallel 2] [--phase PHASE …] [--engine ENGINE …]      needs root
    python -m bench kills --phase PHASE --engine ENGINE --at STEP                       one kill once more

With `--record` its page is written after each phase.

A step is a system call that leaves something behind (see `steps`). Those of each phase are counted first; then a fresh
server goes through the phase again and is killed just before its n-th step, for every n, or for evenly spread ones
where there are more than kills. The same server is started again, and must be ready within 30 s, else it is
*unstartable*.
*Lost* is what was acknowledged to an agent and is not in the history, a message that is owed and never comes, a report
without its transition or its message. *Wrong* is what is left half done without a loss: files, a damaged page, an error
in the log.

On PostgreSQL others may deliver too, so what a killed server was about to send stands leased for 60 s: that time is
passed by hand before the next start. The kernel is not killed: what a process wrote is there (for a loss of power see
`tests/upgrade`, `tests/runtime/test_wal.py`).
"""

import argparse
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from bench.kills.phases import ON_SQLITE, PHASES, Work
from bench.kills.stand import Stand, Unstartable, median_and_worst, own_namespace
from tests.conftest import POSTGRES_BINARIES, Postgres

RESULTS: Final = Path(__file__).parents[1] / "results" / "kills.md"
ENGINES: Final = ("sqlite", "postgres")
COUNTS: Final = 2  # times that the steps of a phase are counted; the longer one counts
TRIES: Final = 5  # for a step that a server did not reach before it ended by itself
Database = Callable[[str, Path], str]


@dataclass(kw_only=True)
class Outcome:
    """`at` is the step it was to be killed at, 0 behind all; `how` it ended, `last` what it was about to do."""

    at: int
    how: str
    last: str
    steps: list[str]
    lost: list[str]
    wrong: list[str]
    unstartable: str
    twice: int
    times: list[float]

    @property
    def killed(self) -> bool:
        return self.how != "ended before"

    @property
    def good(self) -> bool:
        return not (self.lost or self.wrong or self.unstartable)


@dataclass(kw_only=True)
class Cell:
    """A case of a phase on one engine, and its share of the kills. `steps` are those that were counted."""

    name: str
    engine: str
    work: Work
    share: int
    steps: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)


def spread(steps: int, kills: int) -> list[int]:
    """At which of so many steps so many kills go: each once, and again, or evenly spread over them."""
    if kills >= steps:
        return [1 + n % steps for n in range(kills)]
    return [1 + n * steps // kills for n in range(kills)]


def shares(kills: int, parts: int) -> list[int]:
    """So many kills in so many parts."""
    return [kills // parts + (n < kills % parts) for n in range(parts)]


def once(cell: Cell, at: int | None, database: "Databases") -> Outcome:
    """One server, one kill. Where something is found its folder stays, and is named."""
    folder = Path(tempfile.mkdtemp(prefix="vs-kills-"))
    with database(cell.engine, folder) as url:
        stand, unstartable = Stand(url, folder, at), ""
        try:
            cell.work(stand)
        except Unstartable as e:
            unstartable = str(e)
        except Exception as e:  # noqa: BLE001 - of whatever kind: it is a find, or a fault of this bench, and is told
            stand.wrong.append(f"{type(e).__name__}: {e}")
        finally:
            stand.end()
        stand.look()
        found = Outcome(
            at=at or 0, how=stand.how, last=stand.last, steps=stand.steps, lost=stand.lost, wrong=stand.wrong,
            unstartable=unstartable, twice=stand.twice, times=stand.times,
        )  # fmt: skip
    if not found.good:
        where = f"{cell.name}, {cell.engine}, step {found.at} ({found.last}), kept in {folder}"
        for kind, words in (("lost", found.lost), ("wrong", found.wrong), ("unstartable", [unstartable])):
            for word in filter(None, words):
                print(f"{kind}: {word}\n    {where}", flush=True)
    else:
        shutil.rmtree(folder)
    return found


def kill(cell: Cell, at: int, database: "Databases") -> Outcome:
    """A kill at that step, or at an earlier one where the server ended before it."""
    for _ in range(TRIES):
        found = once(cell, at, database)
        if found.killed or not found.good:
            return found
        at = max(1, min(at, len(found.steps)) - 1)
    return found


class Databases:
    """Empty ones of both engines, each for as long as it is asked for."""

    def __init__(self, cluster: Postgres | None) -> None:
        self._cluster, self._one = cluster, threading.Lock()

    @contextmanager
    def __call__(self, engine: str, folder: Path) -> Iterator[str]:
        if engine == "sqlite":
            yield f"sqlite:///{folder}/data/sentinel.db"
            return
        assert self._cluster is not None
        with self._one:
            url = self._cluster.new_database()
        try:
            yield url
        finally:
            with self._one:
                self._cluster.drop(url)


@contextmanager
def _databases(engines: Sequence[str]) -> Iterator[Databases]:
    if "postgres" not in engines:
        yield Databases(None)
        return
    folder = Path(tempfile.mkdtemp(prefix="vs-pg-"))
    folder.chmod(0o755)
    cluster = Postgres(folder, POSTGRES_BINARIES[0])
    try:
        cluster.start()
        try:
            yield Databases(cluster)
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


HEAD: Final = ("phase", "engine", "steps", "kills", "at so many of them", "lost", "unstartable", "wrong", "told twice",
               "until ready again, s, median / worst")  # fmt: skip


def row(cell: Cell) -> list[str]:
    killed = [o for o in cell.outcomes if o.killed]
    at = {o.at for o in killed if o.how == "at the step"}
    return [
        cell.name, cell.engine, f"{len(cell.steps)}", f"{len(killed)}", f"{len(at)}",
        f"{sum(bool(o.lost) for o in cell.outcomes)}", f"{sum(bool(o.unstartable) for o in cell.outcomes)}",
        f"{sum(bool(o.wrong) for o in cell.outcomes)}", f"{sum(o.twice for o in cell.outcomes)}",
        median_and_worst([t for o in cell.outcomes for t in o.times]),
    ]  # fmt: skip


def page(cells: Sequence[Cell], at: datetime) -> str:
    outcomes = [o for cell in cells for o in cell.outcomes]
    killed = sum(o.killed for o in outcomes)
    lost, unstartable, wrong = (
        sum(bool(getattr(o, what)) for o in outcomes) for what in ("lost", "unstartable", "wrong")
    )
    lines = [
        "# kill -9 at every step", "",
        f"{at:%Y-%m-%d}, Linux {platform.release()}, Python {platform.python_version()}; `python -m bench kills`.", "",
        "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD),
        *("| " + " | ".join(row(cell)) + " |" for cell in cells), "",
        f"{killed} kills: {lost} lost, {unstartable} unstartable, {wrong} wrong. "
        + ("As it must be." if all(o.good for o in outcomes) else "**Not as it must be.**"), "",
        "Steps are system calls that leave something behind; of each phase:", "",
        *(f"- {cell.name}, {cell.engine}: {kinds(cell.steps)}" for cell in cells),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def kinds(steps: Sequence[str]) -> str:
    return ", ".join(f"{count} `{what}`" for what, count in Counter(steps).most_common())


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000, help="in all; each phase on each engine has as many")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--phase", action="append", choices=PHASES, help="this one alone; more than once for more")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="this one alone")
    parser.add_argument("--at", type=int, help="kill once at this step of each case")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.name} among the results")
    given = parser.parse_args(words)
    if os.geteuid() != 0 or platform.machine() != "x86_64":
        sys.exit("network namespaces need root, and the system calls are those of x86-64")
    engines, phases = given.engine or ENGINES, given.phase or list(PHASES)
    both = [(p, e) for p in phases for e in engines if e == "sqlite" or p not in ON_SQLITE]
    cells = [
        Cell(name=name, engine=engine, work=work, share=share)
        for (phase, engine), of_both in zip(both, shares(given.kills, len(both)), strict=True)
        for (name, work), share in zip(PHASES[phase].items(), shares(of_both, len(PHASES[phase])), strict=True)
    ]
    print("| " + " | ".join(HEAD) + " |", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _databases(engines) as database, ThreadPoolExecutor(given.parallel, initializer=own_namespace) as pool:
        try:
            for number, cell in enumerate(cells, 1):
                _try(cell, given.at, pool, database)
                print("| " + " | ".join(row(cell)) + " |", flush=True)
                if given.record:
                    RESULTS.write_text(page(cells[:number], datetime.now(UTC)), encoding="utf-8")
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else all that wait are tried before the end
            raise
    print("\n" + page(cells, datetime.now(UTC)))
    if not all(o.good for cell in cells for o in cell.outcomes):
        sys.exit(1)


def _try(cell: Cell, at: int | None, pool: ThreadPoolExecutor, database: Databases) -> None:
    """All kills of one phase on one engine, or the one `at` that step."""
    if at is None:
        cell.outcomes = [pool.submit(once, cell, None, database).result() for _ in range(COUNTS)]
        cell.steps = max((o.steps for o in cell.outcomes), key=len)
        left = max(0, cell.share - sum(o.killed for o in cell.outcomes))
        plan = spread(len(cell.steps), left) if cell.steps else []
    else:
        plan = [at]
    running = [pool.submit(kill, cell, step, database) for step in plan]
    cell.outcomes += [one.result() for one in running]
