"""The runner: labs up, posts side by side, every row several times, a table and the raw figures."""

import argparse
import itertools
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench.folders import unused
from bench.situations import table
from bench.situations.posts import Post
from bench.situations.rows import PROFILES, ROWS
from bench.situations.trial import Result, Row, Trial
from lab import Lab, plan


class Run:
    def __init__(
        self, *, repeat: int, privileged: bool, folder: Path, results: list[Result], source: Path | None
    ) -> None:
        self._repeat, self._privileged, self._folder, self._results = repeat, privileged, folder, results
        self._source = source
        self._say = threading.Lock()
        self._numbers = itertools.count()
        self._began = time.monotonic()

    def chain(self, lab: Lab, kind: str, posts: Sequence[tuple[str, list[Row]]]) -> None:
        """Posts one after the other: they share something of the lab."""
        for name, rows in posts:
            self.post(lab, kind, name, rows)

    def post(self, lab: Lab, kind: str, name: str, rows: list[Row]) -> None:
        post = None
        try:
            folder = self._folder / kind
            number, profile = next(self._numbers), PROFILES[name]
            post = Post(lab, name, number, folder, profile, privileged=self._privileged, source=self._source)
            post.start()
        except Exception as e:  # noqa: BLE001 - a post that does not come up is a wrong answer in all its rows
            for row in rows:
                trials = [Trial(complaints=[f"the post did not start: {_words(e)}"]) for _ in range(self._repeat)]
                self._done(Result(row, kind, trials))
        else:
            for row in rows:
                result = Result(row, kind)
                for _ in range(self._repeat):
                    result.trials.append(self._try(row, post))
                self._done(result)
        finally:
            if post is not None:
                post.stop()

    def _try(self, row: Row, post: Post) -> Trial:
        if row.rest:
            time.sleep(row.rest)
        try:
            trial = row.way(row, post)
        except Exception as e:  # noqa: BLE001 - what breaks a trial is its answer, and the next one starts from health
            trial = Trial(complaints=[_words(e)])
            if not isinstance(e, (AttributeError, TimeoutError, AssertionError)):
                traceback.print_exc()
        for name, process in (("agent", post.agent), ("server", post.server)):
            if process is not None and process.poll() is not None:
                trial.complaints.append(f"the {name} ended by itself: {process.output().strip().splitlines()[-1:]}")
        if not trial.right:
            self._print(f"      {row.name} on {post.name}: {'; '.join(trial.complaints)[:400]}")
            self._mend(post)
        return trial

    def _mend(self, post: Post) -> None:
        try:
            post.heal()
            if post.server.poll() is not None:
                post.start_server()
            if post.agent is not None and post.agent.poll() is not None:
                post.start_agent()
            if post.profile.watched:
                post.at_rest(60)
        except Exception as e:  # noqa: BLE001 - the next trial will say what is wrong
            self._print(f"      {post.name} does not mend: {_words(e)}")

    def _done(self, result: Result) -> None:
        self._results.append(result)
        self._print(f"{time.monotonic() - self._began:6.0f} s  {table.line(result)}")

    def _print(self, text: str) -> None:
        with self._say:
            print(text, flush=True)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def chosen(names: str, kinds: Sequence[str], *, unprivileged: bool, of: Sequence[Row] = ROWS) -> dict[str, list[Row]]:
    """The rows to try for each kind of tunnel. Raises ValueError for a name of no row, and where nothing is left."""
    if unknown := sorted(n for n in _listed(names) if not _named(n, of)):
        raise ValueError(f"no row is called {', '.join(unknown)}")
    rows = [r for r in _named(names, of) if not (unprivileged and r.needs_watch) and not r.lacks()]
    todo = {kind: [r for r in rows if kind in r.kinds] for kind in kinds}
    if not any(todo.values()):
        on = [f"{r.name} on {', '.join(r.kinds)}" for r in rows if names]
        raise ValueError(f"nothing to try on {', '.join(kinds)} so; {'; '.join(on) or 'no such row is possible here'}")
    return todo


def impossible(names: str, *, of: Sequence[Row] = ROWS) -> dict[str, str]:
    """The rows that cannot be tried on this machine, and why: neither right nor wrong."""
    return {r.name: why for r in _named(names, of) if (why := r.lacks())}


def _named(names: str, of: Sequence[Row]) -> list[Row]:
    """Rows by number or by number and part; all where `names` is empty."""
    wanted = _listed(names)
    return [r for r in of if not wanted or {r.name, str(r.number)} & wanted]


def _listed(names: str) -> set[str]:
    return {n.strip() for n in names.split(",") if n.strip()}


def chains(rows: Sequence[Row]) -> list[list[tuple[str, list[Row]]]]:
    """Posts with their rows, those of one chain together; the longest work first."""
    by_post: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_post[row.post].append(row)
    by_chain: dict[str, list[tuple[str, list[Row]]]] = defaultdict(list)
    for name, its in by_post.items():
        by_chain[PROFILES[name].chain or name].append((name, its))
    return sorted(by_chain.values(), key=lambda posts: -sum(_cost(r) for _, its in posts for r in its))


def _cost(row: Row) -> float:
    """About how many seconds one trial takes."""
    known = {30: 90, 32: 120, 38: 90, 42: 200, 31: 70, 40: 50}
    return known.get(row.number, 12 + row.rest + row.quiet + (20 if row.fault else 0))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench situations", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="numbers, with or without a part: 1,5,45b")
    parser.add_argument("--again", action="store_true", help="keep what the last run found of the other rows")
    parser.add_argument("--kind", choices=[*plan.KINDS, "both", "all"], default="both")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--parallel", type=int, default=5)
    parser.add_argument("--unprivileged", action="store_true", help="agents as uid 65534 without any capability")
    parser.add_argument("--out", type=Path, default=None, help="the page to write its section of")
    parser.add_argument(
        "--logs", type=Path, default=None, help="the folder for the labs' logs; NAME-2, NAME-3 … if it is not empty"
    )
    parser.add_argument("--source", type=Path, default=None, help="the program to try: another tree's src")
    given = parser.parse_args(words)
    kinds = {"both": ["wireguard", "openvpn"], "all": list(plan.KINDS)}.get(given.kind, [given.kind])
    left_out = impossible(given.rows)
    for name, why in left_out.items():
        print(f"row {name} is not possible here: {why}", flush=True)
    try:
        todo = chosen(given.rows, kinds, unprivileged=given.unprivileged)
    except ValueError as e:
        parser.error(str(e))
    kept = unused(given.logs) if given.logs else None
    if kept:
        print(f"logs in {kept}", flush=True)
    before = table.earlier(ROWS, unprivileged=given.unprivileged) if given.again else []
    results: list[Result] = []
    began = time.time()
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="vs-situations-")))
        folder.chmod(0o755)
        run = Run(
            repeat=given.repeat,
            privileged=not given.unprivileged,
            folder=folder,
            results=results,
            source=given.source and given.source.resolve(),
        )
        work = []
        for kind in kinds:
            names = dict.fromkeys(r.post for r in todo[kind])
            if not names:
                continue
            lab = ends.enter_context(Lab([PROFILES[n].of(n, kind) for n in names], directory=kept and kept / kind))
            work += [(lab, kind, posts) for posts in chains(todo[kind])]
        work.sort(key=lambda w: -sum(_cost(r) for _, its in w[2] for r in its))
        with ThreadPoolExecutor(given.parallel) as pool:
            for future in [pool.submit(run.chain, *item) for item in work]:
                future.result()
    wrong = sum(not t.right for r in results for t in r.trials)
    tried = sum(len(r.trials) for r in results)
    if given.again:
        anew = {(r.row.name, r.kind) for r in results}
        results += [r for r in before if (r.row.name, r.kind) not in anew]
    order = list(plan.KINDS)
    results.sort(key=lambda r: (order.index(r.kind), r.row.number, r.row.part))
    took = time.time() - began
    table.write_raw(results, began, took, unprivileged=given.unprivileged, left_out=left_out)
    again = given.rows if given.again else ""
    page = table.section(
        results, began, took, repeat=given.repeat, unprivileged=given.unprivileged, again=again, left_out=left_out
    )
    if given.out is not None:
        table.put(given.out, page)
    print(page)
    print(f"{wrong} of {tried} trials were wrong; {took / 60:.1f} minutes")
    sys.exit(1 if wrong else 0)
