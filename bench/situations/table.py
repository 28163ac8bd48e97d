"""What a run found, as a page for people and as figures for programs."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from bench.situations.trial import Result, Row, Trial

RESULTS = Path(__file__).resolve().parents[1] / "results"
_NAMES = {"wireguard": "WireGuard", "openvpn": "OpenVPN"}  # the others are called as the lab calls them
MESSAGE = 1.0  # seconds from the verdict until it has reached people
_HEAD = """# Measured

Situations of [the table](situations.md) on real tunnels in the lab, each several times, written by the run itself
(`python -m bench situations`). *Right* means: this state with its findings, no other state before it, the one message
that is due and no second one, and *protected* again after the repair. Seconds count from the moment before the fault's
first command. The verdict's time is from the server's records, the message's is its arrival at a stand-in for Telegram.
A finding that changes no state has no record; it is timed by the event stream, which is at most 0.25 s late. Faults
with a promised time are tried with an agent with default settings that has been idle. Two settings differ: a server
waits 4 s instead of 60 for calm after repeated trouble, except in row 42, because here all trouble is repeated; and
rounds are 4 s apart instead of 30 where *silent* is expected, or a change without any notification from the kernel.
"""


def line(result: Result) -> str:
    """One result, for the terminal."""
    good = sum(t.right for t in result.trials)
    mark = "right" if good == len(result.trials) else "WRONG"
    times = _pair([t.verdict for t in result.trials])
    return f"{mark} {good}/{len(result.trials)}  {result.row.name:>4} {result.kind:<11} {result.row.title}: {times}"


def earlier(rows: Sequence[Row], *, unprivileged: bool) -> list[Result]:
    """What the last run found, out of its raw figures. Raises KeyError for a row that is not among `rows`."""
    by_name = {row.name: row for row in rows}
    raw = json.loads(_raw_file(unprivileged=unprivileged).read_text(encoding="utf-8"))["rows"]
    return [
        Result(by_name[r["row"]], r["tunnel"], [Trial(**{k: t[k] for k in t if k != "right"}) for t in r["trials"]])
        for r in raw
    ]


def section(
    results: Sequence[Result], began: float, took: float, *, repeat: int, unprivileged: bool, again: str = "",
    left_out: Mapping[str, str],
) -> str:  # fmt: skip
    """The page's part of this run, which tried only the rows `again` anew where some are named.

    `left_out` are those that could not be tried here, each with the reason.
    """
    title = "As uid 65534, without a capability" if unprivileged else "As root"
    when = datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d %H:%M UTC")
    times = "once" if repeat == 1 else f"{repeat} times"
    good, whole = sum(t.right for r in results for t in r.trials), sum(len(r.trials) for r in results)
    lines = [
        f"## {title}",
        "",
        f"{when}, {took / 60:.0f} minutes, each row {times}: {good} of {whole} trials right. {_machine()}."
        + (f" In this run rows {again} were tried again; the others are of the run before." if again else ""),
        "",
        "| # | situation | tunnel | right verdict | right | fault → verdict, median / worst | promised "
        "| fault → message, median / worst | verdict → message, worst | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_cells(r, unprivileged=unprivileged) for r in results),
    ]
    wrong = [(r, t) for r in results for t in r.trials if not t.right]
    if wrong:
        lines += ["", "What was wrong:", ""]
        lines += [f"- {r.row.name}, {r.kind}: {'; '.join(t.complaints)[:300]}" for r, t in wrong]
    if left_out:
        lines += ["", "Not possible on this machine, and not tried:", ""]
        lines += [f"- {name}: {why}" for name, why in left_out.items()]
    return "\n".join(lines) + "\n"


def _cells(result: Result, *, unprivileged: bool) -> str:
    row, trials = result.row, result.trials
    verdict = f"{row.state} {' '.join(f'`{c}`' for c in sorted(row.codes | row.one_of))}".strip()
    verdicts = [t.verdict for t in trials]
    good = sum(t.right for t in trials)
    share = f"{good} of {len(trials)}"
    worst_message = [t.message_after_verdict for t in trials if t.message_after_verdict is not None]
    late = f"{max(worst_message):.2f} s{'' if max(worst_message) <= MESSAGE else ' **late**'}" if worst_message else ""
    told = _pair([t.message for t in trials]) if row.told else "none is due"
    cells = (
        row.name, row.title, _NAMES.get(result.kind, result.kind), verdict,
        share if good == len(trials) else f"**{share}**", _pair(verdicts),
        _promise(row, verdicts, unprivileged=unprivileged), told, late, row.note,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _promise(row: Row, verdicts: Sequence[float | None], *, unprivileged: bool) -> str:
    median, worst = row.median, row.worst
    if unprivileged and row.without_watch is not None:
        median = worst = row.without_watch
    if median is None or worst is None:
        return ""
    there = [v for v in verdicts if v is not None]
    kept = len(there) == len(verdicts) and statistics.median(there) <= median and max(there) <= worst
    return f"{median:g} / {worst:g} s: {'met' if kept else '**not met**'}"


def _pair(values: Sequence[float | None]) -> str:
    there = [v for v in values if v is not None]
    if not there:
        return "–"
    lost = "" if len(there) == len(values) else f", {len(values) - len(there)} missing"
    return f"{statistics.median(there):.2f} / {max(there):.2f} s{lost}"


def _machine() -> str:
    model = platform.machine()
    for entry in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if entry.startswith("model name"):
            model = entry.partition(":")[2].strip()
            break
    return f"{os.cpu_count()} cores ({model}), Linux {platform.release()}, Python {platform.python_version()}"


def write_raw(
    results: Sequence[Result], began: float, took: float, *, unprivileged: bool, left_out: Mapping[str, str]
) -> None:
    """All figures, one file a way of running."""
    RESULTS.mkdir(exist_ok=True)
    found = {
        "began": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
        "seconds": round(took),
        "machine": _machine(),
        "not_possible_here": dict(left_out),
        "rows": [
            {"row": r.row.name, "title": r.row.title, "tunnel": r.kind, "state": r.row.state,
             "codes": sorted(r.row.codes), "trials": [_raw(t) for t in r.trials]}
            for r in results
        ],
    }  # fmt: skip
    _raw_file(unprivileged=unprivileged).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _raw_file(*, unprivileged: bool) -> Path:
    return RESULTS / ("situations-unprivileged.json" if unprivileged else "situations.json")


def _raw(trial: Trial) -> dict[str, object]:
    facts = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(trial).items()}
    return {"right": trial.right, **facts}


def put(page: Path, text: str) -> None:
    """Write this run's section into the page and leave the other one as it is."""
    old = page.read_text(encoding="utf-8") if page.exists() else _HEAD
    parts = {part.split("\n", 1)[0]: part for part in old.split("\n## ")[1:]}
    own = text.removeprefix("## ")
    parts[own.split("\n", 1)[0]] = own
    first = sorted(parts, key=lambda title: title != "As root")
    page.write_text(_HEAD + "".join(f"\n## {parts[title].rstrip()}\n" for title in first), encoding="utf-8")
