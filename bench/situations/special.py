"""Rows that are not a fault of the line: agents and servers that go away, flapping, clocks."""

import time
from typing import Any

from bench.situations.posts import Post
from bench.situations.trial import Row, Trial, by_fault
from lab import until


def agent_killed(row: Row, post: Post) -> Trial:
    """39: SIGKILL; silent by the deadline, and no word of a leak or a dead tunnel."""
    trial = Trial()
    began = time.time()
    post.agent.kill()
    found = post.ear.wait(began, lambda f: f.state == "silent", row.limit)
    if found is None:
        trial.complaints.append(f"not silent within {row.limit:g} s: {post.brief()}")
    else:
        moves = [m for m in post.moves(began) if m["new"] == "silent"]
        trial.verdict = (post.seconds(moves[0]["decided_at"]) if moves else found.time) - began
        if bad := found.codes & row.never:
            trial.complaints.append(f"says {sorted(bad)}")
    _one_message(row, post, trial, began)
    post.start_agent()
    post.at_rest(40)
    return trial


def server_away(_: Row, post: Post) -> Trial:
    """40: the server is gone for 20 s. Nothing is told; what the agent saw meanwhile is there afterwards."""
    trial = Trial()
    post.stop_server()
    gone = time.time()
    away = 20.0
    time.sleep(away)
    post.start_server()
    back = time.time()

    def replayed() -> list[dict[str, Any]]:
        return post.observations(gone, gone + away)

    least = int(away / post.profile.interval) - 1
    try:
        until(lambda: len(replayed()) >= least, 30, "the replay", interval=0.2)
        trial.verdict = time.time() - back
    except TimeoutError:
        trial.complaints.append(f"{len(replayed())} observations of the outage, at least {least} were due")
    if wrong := {o["state"] for o in replayed()} - {"protected"}:
        trial.complaints.append(f"replayed as {sorted(wrong)}")
    numbers = [o["seq"] for o in sorted(replayed(), key=lambda o: float(o["seq"]))]
    if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        trial.complaints.append(f"lost: numbers {numbers}")
    _nothing_but_started(post, trial, gone)
    return trial


def server_killed(_: Row, post: Post) -> Trial:
    """41: SIGKILL and a new start: state, since, history and incidents as before, and nothing told but the start."""
    trial = Trial()
    history, state, incidents = post.history(), post.status(), post.api("/incidents")
    gone = time.time()
    post.stop_server(kill=True)
    post.start_server()
    trial.verdict = time.time() - gone
    _nothing_but_started(post, trial, gone)
    if post.history() != history:
        trial.complaints.append("the history changed")
    if post.status()["since"] != state["since"]:
        trial.complaints.append("`since` changed")
    if post.api("/incidents") != incidents:
        trial.complaints.append("incidents changed")
    return trial


def flapping(row: Row, post: Post) -> Trial:
    """42: the tunnel goes and comes every few seconds: one incident that says flapping, and few messages."""
    trial = Trial()
    first_incident = max((i["id"] for i in post.api("/incidents")["incidents"]), default=0)
    began = time.time()
    found = None
    while found is None and time.time() - began < row.limit:
        post.site.delete_tunnel()
        time.sleep(5)
        post.site.restore_tunnel()
        found = post.ear.wait(began, lambda f: "flapping" in f.codes, 9)
    if found is None:
        trial.complaints.append(f"no flapping within {row.limit:g} s: {post.brief()}")
    else:
        trial.verdict = found.time - began
    told = post.heard(began)
    flaps = [m for m in told if "flapping" in m["plain"].lower() or "comes and goes" in m["plain"].lower()]
    if flaps:
        trial.message = float(flaps[0]["time"]) - began
    trial.told = [m["plain"].splitlines()[0][:80] for m in told]
    # Two more rounds up and down: nobody hears of them.
    for _ in range(2):
        post.site.delete_tunnel()
        time.sleep(5)
        post.site.restore_tunnel()
        time.sleep(5)
    if found is not None and (more := len(post.heard(began)) - len(told)) > (0 if flaps else 1):
        trial.complaints.append(f"{more} messages while flapping")
    if len(told) > 6:
        trial.complaints.append(f"{len(told)} messages until it was known")
    post.heal()
    post.at_rest(240)
    # What came before flapping was known are incidents of their own; the flapping itself is one.
    since = [i for i in post.api("/incidents")["incidents"] if i["id"] > first_incident]
    if (n := sum("flapping" in {f["code"] for f in i["findings"]} for i in since)) > 1:
        trial.complaints.append(f"{n} incidents of flapping")
    return trial


def wrong_clock(row: Row, post: Post) -> Trial:
    """46: the agent's wall clock is ten minutes ahead; said as a finding, and order and times stay true."""
    trial = Trial()
    post.agent.stop()
    began = time.time()
    post.launcher = ("-m", "bench.situations.skewed", "600")
    try:
        post.start_agent()
        found = post.ear.wait(began, lambda f: "clock_skew" in f.codes, row.limit)
        if found is None:
            trial.complaints.append(f"no clock_skew within {row.limit:g} s: {post.brief()}")
        else:
            trial.verdict = found.time - began
        time.sleep(row.quiet)
        seen = sorted(post.observations(began, time.time() + 3600), key=lambda o: int(o["seq"]))
        times = [post.seconds(o["at"]) for o in seen]
        if times != sorted(times):
            trial.complaints.append("observations out of order")
        late = [post.seconds(o["received_at"]) - post.seconds(o["at"]) for o in seen]
        if not seen or any(not -1 < d < 15 for d in late):
            trial.complaints.append(f"{len(seen)} observations, dated up to {max(map(abs, late), default=0):.0f} s off")
        if post.now().state != "protected":
            trial.complaints.append(f"is {post.brief()}")
        if heard := post.heard(began):
            trial.complaints.append(f"told {[m['plain'][:60] for m in heard]}")
    finally:
        post.agent.stop()
        post.launcher = ("-m", "vpn_sentinel")
        post.start_agent()
    post.ear.wait(time.time(), lambda f: "clock_skew" not in f.codes, 20)
    post.at_rest(30)
    return trial


def late_kill_switch(row: Row, post: Post) -> Trial:
    """29: two seconds in which traffic leaves before the kill switch is up. It stays in the history for ever."""
    struck = time.time()
    trial = by_fault(row, post)
    kept = [m["new"] for m in post.moves(struck)]  # a leak may be dated at the beginning of the round that it met
    if kept.count("leaking") != 1 or kept[-1] != "protected":
        trial.complaints.append(f"the history says {kept}")
    return trial


def home_moves(row: Row, post: Post) -> Trial:
    """43: the provider gives the home another address; no alarm by that, and it is home at once when it leaks."""
    old = post.site.home4
    moved = time.time()
    new = post.site.renew_home_address()
    post.ear.wait(moved, lambda f: new in str(f.body), 8)
    early = [m["plain"][:60] for m in post.heard(moved)]
    alarms = [m["new"] for m in post.moves(moved) if m["new"] in ("leaking", "down", "silent")]
    trial = by_fault(row, post)
    if early or alarms:
        trial.complaints.append(f"the move itself told {early} {alarms}")
    leaks = [m for m in post.moves(moved) if m["new"] == "leaking"]
    if old in str(leaks):
        trial.complaints.append(f"the leak names {old}, and home is {new}")
    return trial


def _one_message(row: Row, post: Post, trial: Trial, began: float) -> None:
    assert row.told is not None
    try:
        until(lambda: post.heard(began), 5, "a message", interval=0.05)
    except TimeoutError:
        trial.complaints.append("no message")
        return
    time.sleep(row.quiet)
    heard = post.heard(began)
    trial.message = float(heard[0]["time"]) - began
    if trial.verdict is not None:
        trial.message_after_verdict = trial.message - trial.verdict
    trial.told = [m["plain"].splitlines()[0][:80] for m in heard]
    if len(heard) != 1 or row.told not in heard[0]["plain"].lower():
        trial.complaints.append(f"told {trial.told}")


def _nothing_but_started(post: Post, trial: Trial, since: float) -> None:
    """One message, "started", and no transition; watched for three intervals of this post."""
    time.sleep(3 * post.profile.interval)
    heard = [m["plain"].splitlines()[0][:80] for m in post.heard(since)]
    if len(heard) != 1 or "started" not in heard[0].lower():
        trial.complaints.append(f"told {heard}")
    if moves := [m["new"] for m in post.moves(since)]:
        trial.complaints.append(f"moved to {moves}")
    if post.now().state != "protected":
        trial.complaints.append(f"is {post.brief()}")
