"""Malformed input for all that reads what others write, guided by what each input leads to (atheris).

    python -m bench fuzz [TARGET …] [--seconds 20] [--count N] [--keep]    the readers, one after another
    python -m bench fuzz TARGET --input FILE                              one input once more, with its traceback
    python -m bench fuzz --port pulse|dns [--count N] [--seed 1]          a UDP port of a running server

Each target begins from its corpus, `tests/fuzz/corpus/TARGET`. A fault is an exception that the reader does not
document, a broken promise of its (see the target), ten seconds or 1 GB for one input, and memory that grows. With
`--keep`, inputs that lead through lines in an order that no other does go into the corpus, the shortest first.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, Final

from bench.fuzz import ports
from bench.fuzz.mutate import CORPUS
from bench.fuzz.target import ENDS
from bench.fuzz.targets import TARGETS

RESULTS: Final = Path(__file__).parents[1] / "results" / "fuzz.md"
FOUND: Final = Path(".cache") / "fuzz"  # what led to a fault
GROWTH_MB: Final = 16.0  # between a tenth of the inputs and the last; libFuzzer's own corpus is in it
LARGEST, MOST = 2048, 16 * 1024  # bytes of an input that is kept, and of a target's
_AT: Final = re.compile(r"#(\d+)\t")


@dataclass(frozen=True, slots=True)
class Outcome:
    """`before` and `after` are MB; `fault` is where the input lies that led to one."""

    name: str
    inputs: int
    seconds: float
    new: int
    before: float
    after: float
    fault: str = ""

    @property
    def good(self) -> bool:
        return not self.fault and self.after - self.before < GROWTH_MB


def fuzz(name: str, seconds: int, count: int, *, keep: bool) -> Outcome:
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="vs-fuzz-", dir="/dev/shm") as folder:
        new = Path(folder) / "new"
        new.mkdir()
        command = [
            *(sys.executable, "-m", "bench.fuzz.worker", name),
            *(f"-max_total_time={seconds}", f"-runs={count}", f"-max_len={TARGETS[name].longest}", "-timeout=10"),
            *(
                "-rss_limit_mb=1024",
                f"-artifact_prefix={found}/",
                f"-seed={int(time.time()) % 2**31}",
                "-detect_leaks=0",
            ),
            *(str(new), str(CORPUS / name)),
        ]
        env = {**os.environ, "TMPDIR": folder}  # libFuzzer ends a process without its own ends
        began = time.monotonic()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
        ) as worker:
            assert worker.stdout is not None
            lines, sizes = [], [(0, 0.0)]
            for line in worker.stdout:
                lines.append(line)
                del lines[:-200]
                if at := _AT.match(line):
                    sizes.append((int(at[1]), _rss(worker.pid) or sizes[-1][1]))
        took, inputs = time.monotonic() - began, sizes[-1][0]
        warm = next((size for number, size in sizes if number >= inputs / 10), 0.0)
        fault = ""
        if worker.returncode:
            sys.stdout.writelines(lines)
            newest = max(found.iterdir(), key=lambda path: path.stat().st_mtime, default=None)
            fault = f"python -m bench fuzz {name} --input {newest}" if newest else "no input was kept"
        with ENDS:
            kept = take(name, new.iterdir()) if keep else 0
    return Outcome(name, inputs, took, kept, warm, sizes[-1][1], fault)


def _rss(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    size = re.search(r"VmRSS:\s*(\d+) kB", status)
    return int(size[1]) / 1024 if size else 0.0


def take(name: str, new: Iterable[Path]) -> int:
    """Keep those of `new` that lead through lines in an order that the corpus does not; returns how many."""
    folder, seen = CORPUS / name, set[tuple[str, int, int]]()
    room, kept = MOST, 0
    one = TARGETS[name].make()

    def traced(data: bytes) -> set[tuple[str, int, int]]:
        ways: set[tuple[str, int, int]] = set()

        def called(frame: FrameType, _event: str, _arg: Any) -> Any:
            if "/vpn_sentinel/" not in frame.f_code.co_filename:
                return None
            last = 0

            def line(frame: FrameType, event: str, _arg: Any) -> Any:
                nonlocal last
                if event == "line":
                    ways.add((frame.f_code.co_filename, last, frame.f_lineno))
                    last = frame.f_lineno
                return line

            return line

        sys.settrace(called)
        try:
            one(data)
        finally:
            sys.settrace(None)
        return ways

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        seen |= traced(data)
        room -= len(data)
    for data in sorted((path.read_bytes() for path in new if path.stat().st_size <= LARGEST), key=len):
        if len(data) <= room and not (ways := traced(data)) <= seen:
            seen |= ways
            room -= len(data)
            kept += 1
            (folder / sha256(data).hexdigest()[:16]).write_bytes(data)
    return kept


def told(outcomes: Sequence[Outcome]) -> str:
    rows = [
        f"| {o.name} | {o.inputs:,} | {o.inputs / o.seconds:,.0f} | {o.new} | {o.before:.1f}, {o.after:.1f} "
        f"| {f'`{o.fault}`' if o.fault else '0'} |"
        for o in outcomes
    ]
    total, faults = sum(o.inputs for o in outcomes), sum(bool(o.fault) for o in outcomes)
    most = max((o.after - o.before for o in outcomes), default=0.0)
    good = all(o.good for o in outcomes)
    return "\n".join(
        [
            "| target | inputs | a second | new in the corpus | RSS at a tenth of them and at the end, MB | faults |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"{total:,} inputs, {faults} faults; RSS grew by {most:.1f} MB at most.",
            "As it must be." if good else "**Not as it must be.**",
        ]
    )


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    parser.add_argument("--count", type=int, default=-1, help="inputs for each target, or datagrams to the port")
    parser.add_argument("--keep", action="store_true", help="new inputs go into the corpus")
    parser.add_argument("--input", type=Path, help="try this one alone")
    parser.add_argument("--port", choices=ports.TARGETS, help="a UDP port of a running server instead")
    parser.add_argument("--seed", type=int, default=1, help="of what is sent to the port")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.name} among the results")
    given = parser.parse_args(words)
    if unknown := [name for name in given.targets if name not in TARGETS]:
        parser.error(f"no such target: {', '.join(unknown)}")
    if given.port:
        ports.main(given.port, given.count if given.count > 0 else 1_000_000, given.seed)
        return
    logging.disable(logging.CRITICAL)
    if given.input:
        with ENDS:
            TARGETS[given.targets[0]].make()(given.input.read_bytes())
        return
    outcomes = []
    for name in given.targets or TARGETS:
        outcomes.append(fuzz(name, given.seconds, given.count, keep=given.keep))
        print(told(outcomes[-1:]).split("\n")[2], flush=True)
    print("\n" + told(outcomes))
    if given.record:
        RESULTS.write_text(told(outcomes) + "\n", encoding="utf-8")
    if not all(o.good for o in outcomes):
        sys.exit(1)
