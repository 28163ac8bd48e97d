"""The same faults in the same minutes, seen by VPN Sentinel and by what people run instead.

    python -m bench detection [--seconds 420]      needs root

Every fault has a site of its own, and all strike at once. A tool that did not find a fault until the end of the run is
"> N s"; its worst case by design stands beside it, computed and marked as such.
"""

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.detection.peers import PEERS, Watch
from bench.detection.plot import Bar, draw
from bench.situations.posts import Post
from bench.situations.rows import PROFILES, ROWS
from bench.situations.trial import Row
from lab import Lab

RESULTS = Path(__file__).resolve().parents[1] / "results"
IMAGE = Path(__file__).resolve().parents[2] / "docs" / "images" / "detection.svg"
NAMES = ("5", "24", "27", "15", "6", "7", "8", "9", "3")
OWN = "VPN Sentinel"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one tool made of one fault. `seconds` None: nothing until the end of the run."""

    row: str
    title: str
    tool: str
    seconds: float | None
    why: str
    bound: str = ""
    looks: int = 0


def one(row: Row, post: Post, seconds: float, rng: random.Random, fault_at: float) -> list[Found]:
    """Strike at `fault_at` and let all of them watch for `seconds`."""
    assert row.fault is not None
    watches = [Watch(peer, post.site, post.url, rng) for peer in PEERS]
    for watch in watches:
        watch.rehearse()
    for watch in watches:
        watch.start(fault_at)
    time.sleep(max(0.0, fault_at - time.time()))
    began = time.time()
    row.fault(post)
    frame = post.ear.wait(began, lambda f: f.state == row.state and row.codes <= f.codes, seconds)
    time.sleep(max(0.0, began + seconds - time.time()))
    for watch in watches:
        watch.stop()
    moves = [m for m in post.moves(began) if m["new"] == row.state]
    own = post.seconds(moves[0]["decided_at"]) - began if frame is not None and moves else None
    why = f"{row.state}: {', '.join(sorted(frame.codes & row.codes))}" if frame is not None else post.brief()
    found = [Found(row=row.name, title=row.title, tool=OWN, seconds=own, why=why)]
    for watch in watches:
        late, reason = (watch.alarm[0] - began, watch.alarm[1]) if watch.alarm else (None, "")
        found.append(
            Found(
                row=row.name,
                title=row.title,
                tool=watch.peer.name,
                seconds=late,
                why=reason,
                bound=watch.peer.bound(row.number),
                looks=watch.looks,
            )
        )
    return found


def table(found: Sequence[Found], seconds: float, when: float) -> str:
    tools = list(dict.fromkeys(f.tool for f in found))
    lines = [
        "# Detection",
        "",
        f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M UTC}, WireGuard in the lab, {seconds:.0f} s from the fault "
        "on. All struck at the same time, each on a site of its own, and every tool watched every site. Seconds from "
        "the fault's first command to the alarm; *computed* is the worst case by design where the run showed none.",
        "",
        f"| # | fault | {' | '.join(tools)} |",
        f"|---|---|{'---|' * len(tools)}",
    ]
    for name, group in itertools.groupby(found, key=lambda f: f.row):
        of = {f.tool: f for f in group}
        title = next(iter(of.values())).title
        lines.append(f"| {name} | {title} | {' | '.join(_cell(of[t], seconds) for t in tools)} |")
    lines += [
        "",
        "- ping every 60 s: `ping -c 1 -W 5 1.1.1.1` by the default route, alarm at the first failure",
        "- handshake older than 180 s: `wg show`, scraped every 15 s as an exporter is, the usual alert rule",
        "- 5-minute keepalive: the system that this one replaces; address by ipinfo.io, country by 1.1.1.1, alarm when "
        "the address is the server's own or unknown or the countries differ, silence after 15 minutes",
    ]
    return "\n".join(lines) + "\n"


def _cell(found: Found, seconds: float) -> str:
    if found.seconds is not None:
        return f"{found.seconds:.1f} s" if found.seconds >= 10 else f"{found.seconds:.2f} s"
    return f"> {seconds:.0f} s" + (f" (computed: {found.bound})" if found.bound else f" ({found.why})")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench detection", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=420.0, help="how long all watch after the faults")
    parser.add_argument("--seed", type=int, default=None, help="for the peers' phases")
    parser.add_argument("--rows", default=",".join(NAMES))
    parser.add_argument("--source", type=Path, default=None, help="the program to try: another tree's src")
    given = parser.parse_args(words)
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(1 << 30)
    rng = random.Random(seed)
    names = given.rows.split(",")
    rows = sorted((r for r in ROWS if r.name in names), key=lambda r: names.index(r.name))
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="vs-detection-")))
        lab = ends.enter_context(Lab([PROFILES[r.post].of(f"row{r.name}", "wireguard") for r in rows]))
        pool = ends.enter_context(ThreadPoolExecutor(len(rows)))
        source = given.source and given.source.resolve()
        posts = []
        for number, row in enumerate(rows):
            profile = PROFILES[row.post]
            post = Post(lab, f"row{row.name}", number, folder, profile, privileged=True, source=source)
            ends.callback(post.stop)
            posts.append(post)
        for start in [pool.submit(p.start) for p in posts]:
            start.result()
        # At rest: the rechecks after the start are over, and the faults strike after the rehearsal.
        strike = time.time() + 45.0
        jobs = [pool.submit(one, *item, given.seconds, rng, strike) for item in zip(rows, posts, strict=True)]
        found = [f for job in jobs for f in job.result()]
    text = table(found, given.seconds, strike)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "detection.md").write_text(text, encoding="utf-8")
    raw = {"seed": seed, "seconds": given.seconds, "found": [asdict(f) for f in found]}
    (RESULTS / "detection.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    bars = [Bar(f"{f.row}  {f.title}", f.tool, f.seconds) for f in found]
    IMAGE.write_text(draw(bars, given.seconds), encoding="utf-8")
    print(text)
