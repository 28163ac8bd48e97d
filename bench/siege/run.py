"""What attacks cost those who are watched.

    python -m bench siege [--tree DIR …] [--only NAMES] [--addresses 1,200] [--seconds 20]

1,000 honest agents report to a real server on loopback. Attacks come one after another and then all together, from one
address and from 200 of as many networks. In each, one tunnel leaks, one goes down and one falls silent. Measured: from
the leak to its webhook, how late silence is told, how long /health takes, the server's memory before, during and up to
a minute after, whether deadlines were moved, and whether anybody was told of a tunnel that is well.

All share this machine. The server has a core of its own, as attackers are elsewhere. They are processes that give way
to the honest (nice 10); what they sent and what processor time it took them stands beside, as does how long the
server's loop had a processor, and how long it waited for one: a goal that is missed while it waited is the machine's to
answer for. The attacks use up the ports of loopback, so that others on this machine cannot connect: give it a network
namespace of its own (`unshare -n`, and `ip link set lo up`).

`tls` and `handshakes` are tried on a server that speaks TLS, `agent` on an agent of its own (that one needs root).

Each `--tree` is a source tree with a `.venv` of its own; this one alone if none is named. Writes
bench/results/siege.json and siege.md after each attack, and keeps what other runs put there of other attacks, addresses
and trees.
"""

import argparse
import asyncio
import contextlib
import json
import resource
import secrets
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.siege.attacks import ALL
from bench.siege.honest import HOME, Agent
from bench.siege.probe import LIMIT, fetch
from bench.siege.server import Server, Sink, WatchedAgent, leave_a_core, udp
from vpn_sentinel.wire import pulse

HERE = Path(__file__).parents[2]
RESULTS = HERE / "bench" / "results"
HONEST, INTERVAL = 1000, 10.0
BEATS, MISSED = 1.0, 3  # seconds between two reports of those that are looked at; the server's default
ALONE = ("agent",)
OVER_TLS = ("tls", "handshakes")
TOGETHER = "together"
CALM = 2.0  # seconds of calm before an attack
PATIENCE = 15.0  # seconds after an attack within which what happened in it is told, or never
BACK = 60.0  # seconds after it within which memory is looked at
NEAR = 10.0  # MB above what it was before that count as back
GOALS = {"leak": 1.0, "late": 2.0, "health": 0.3, "memory": 50.0}
Got = list[tuple[float, dict[str, Any]]]


@dataclass(kw_only=True)
class Row:
    """Seconds and MB. None is never, and of `lag` that the server does not tell it; `moved` are times and seconds.

    `loop` and `waited` are shares of the time: that the server's loop had a processor, and that it waited for one.
    """

    attack: str
    addresses: int
    tree: str
    seconds: float
    at: str = ""
    leak: float | None = None
    down: float | None = None
    late: float | None = None
    newcomer: float | None = None
    health: float | None = None
    health_worst: float = LIMIT
    health_failed: int = 0
    before: float = 0.0
    most: float = 0.0
    after: float = 0.0
    moved: tuple[int, float] = (0, 0.0)
    false_alarms: int = 0
    loop: float = 0.0
    waited: float = 0.0
    lag: float | None = None
    attackers: float = 0.0
    sent: dict[str, int] = field(default_factory=dict)
    honest: dict[str, float] = field(default_factory=dict)
    pulses: float | None = None
    answers: bool = True

    def missed(self) -> list[str]:
        """The goals that it missed."""
        on_agent = self.attack in ALONE
        found = {
            "leak": not on_agent and (self.leak is None or self.leak > GOALS["leak"]),
            "silence": not on_agent and (self.late is None or self.late > GOALS["late"]),
            "health": self.health_failed > 0 or self.health_worst > GOALS["health"],
            "memory": self.most - self.before > GOALS["memory"] or self.after - self.before > NEAR,
            "deadlines": self.moved[0] > 0,
            "false alarms": self.false_alarms > 0,
        }
        return [goal for goal, is_missed in found.items() if is_missed]


@contextlib.asynccontextmanager
async def helper(module: str, *words: object, before: Sequence[str] = ()) -> AsyncIterator[asyncio.subprocess.Process]:
    made = await asyncio.create_subprocess_exec(
        *before, sys.executable, "-m", f"bench.siege.{module}", *map(str, words), cwd=HERE,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield made
    finally:
        if made.returncode is None:
            made.kill()
            await made.wait()


async def attackers(
    names: Sequence[str], seconds: float, target: dict[str, Any], before: Sequence[str] = ()
) -> dict[str, Any]:
    """Let them run to their end; what they sent, and the processor time that it took, in seconds."""
    running = [
        await asyncio.create_subprocess_exec(
            *before, "nice", "-n", "10", sys.executable, "-m", "bench.siege.attacks",
            json.dumps({"name": name, "seconds": seconds, **target}), cwd=HERE, stdout=asyncio.subprocess.PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (20_000, 20_000)),
        )
        for name in names
    ]  # fmt: skip
    sent, cpu = Counter[str](), 0.0
    try:
        for process in running:
            try:
                said, _ = await asyncio.wait_for(process.communicate(), seconds + PATIENCE)
                told = json.loads(said)
                sent.update(told["sent"])
                cpu += told["cpu"]
            except TimeoutError:
                sent["attackers that did not end"] += 1
    finally:
        for process in running:
            if process.returncode is None:
                process.kill()
                await process.wait()
    return {"sent": dict(sent), "cpu": cpu}


async def until(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (did := done()) and time.monotonic() < end:  # noqa: ASYNC110 - the condition is a log's or a list's
        await asyncio.sleep(0.1)
    return did


def false_alarms(got: Got, *well: str) -> int:
    """Messages that a tunnel is not well whose name begins so: nothing ever befell one."""
    bad = ("leaking", "down", "silent", "degraded", "unverified")
    return sum(str(body.get("tunnel")).startswith(well) and body.get("kind") in bad for _, body in got)


class Siege:
    """One server with those that it watches, for as many attacks as it survives."""

    def __init__(self, tree: Path, label: str, *, tls: bool) -> None:
        self.tree, self.label, self.tls = tree, label, tls
        self.got: Got = []

    @contextlib.asynccontextmanager
    async def stands(self) -> AsyncIterator["Siege"]:
        sink = await asyncio.get_running_loop().create_server(lambda: Sink(self.got), "127.0.0.1", 0)
        self.server = Server(self.tree, sink.sockets[0].getsockname()[1], tls=self.tls)
        try:
            if not await until(lambda: "server started" in self.server.said(), 30):
                raise RuntimeError(f"{self.label} does not start: {self.server.said()[-500:]}")
            self.token = await asyncio.to_thread(self.server.token, "rogue")
            self.old_token = await asyncio.to_thread(self.server.token, "rotated")
            self.rotated = Agent(self.server.api, self.server.key, "rotated", BEATS, tls=self.tls)
            at = self.server.api, self.server.key, HONEST, INTERVAL, "tls" if self.tls else "plain"
            async with helper("honest", *at) as self.honest:
                running = asyncio.create_task(self.rotated.run())
                await asyncio.sleep(INTERVAL + CALM)
                await until(lambda: len(self.got) > HONEST, BACK)  # each is told as connected
                await asyncio.to_thread(self._visit)
                yield self
                running.cancel()
        finally:
            self.server.stop()
            sink.close()

    def _visit(self) -> None:
        """As a person and a scraper would: what is loaded and kept at the first answers is no attack's."""
        for port, path in ((self.server.dashboard, "/"), (self.server.health, "/metrics")) * 3:
            fetch(port, path)

    async def _since(self) -> dict[str, float]:
        """Of the honest agents, since the last call."""
        assert self.honest.stdin is not None
        assert self.honest.stdout is not None
        self.honest.stdin.write(b"\n")
        told: dict[str, float] = json.loads(await asyncio.wait_for(self.honest.stdout.readline(), 20))
        return told

    async def under(self, attack: str, seconds: float, addresses: int) -> Row:
        row = Row(attack=attack, addresses=addresses, tree=self.label, seconds=seconds)
        names = [n for n in ALL if n not in (*OVER_TLS, *ALONE)] if attack == TOGETHER else [attack]
        server, word = self.server, secrets.token_hex(3)
        leaker, dier, silencer, newcomer = (
            Agent(server.api, server.key, f"{who}-{word}", BEATS, tls=self.tls)
            for who in ("leaker", "dier", "silencer", "newcomer")
        )
        running = [asyncio.create_task(agent.run()) for agent in (leaker, dier, silencer)]
        await self._since()
        since, told_before = len(server.said()), len(self.got)
        row.before = row.most = server.memory()

        def told(agent: Agent, kind: str) -> float | None:
            found = (t for t, body in self.got if body.get("tunnel") == agent.name and body.get("kind") == kind)
            return next(found, None)

        async with helper("probe", server.health, "/health") as probe:
            await asyncio.sleep(CALM)
            began, (ran, waited) = time.monotonic(), server.ran()
            ports = {"api": server.api, "health": server.health, "dashboard": server.dashboard, "canary": server.canary}
            keys = {"token": self.token, "old_token": self.old_token}
            attacking = asyncio.create_task(attackers(names, seconds, {"addresses": addresses} | ports | keys))
            watching = asyncio.create_task(self._memory(row, attacking))
            pulsing = asyncio.create_task(self._pulses(attacking))
            await asyncio.sleep(seconds / 4)
            if "revoked" in names:
                await asyncio.to_thread(server.command, "token", "revoke", "rotated")
                self.old_token = await asyncio.to_thread(server.token, "rotated")
            turned = time.monotonic()
            leaker.turn({"address": HOME})
            dier.turn({"up": False})
            silencer.turn(None)
            running.append(asyncio.create_task(newcomer.run()))
            attack_did = await attacking
            row.sent, row.attackers = attack_did["sent"], attack_did["cpu"] / seconds
            took = time.monotonic() - began
            ran, waited = (now - then for now, then in zip(server.ran(), (ran, waited), strict=True))
            row.loop, row.waited = ran / took, waited / took
            seen = (leaker, "leaking"), (dier, "down"), (silencer, "silent")
            await until(lambda: newcomer.heard_at > 0 and all(told(*what) is not None for what in seen), PATIENCE)
            row.newcomer = newcomer.heard_at - turned if newcomer.heard_at else None
            at = [told(*what) for what in seen]

            row.leak, row.down = (None if t is None else t - turned for t in at[:2])
            row.late = None if at[2] is None else at[2] - silencer.said_at - (MISSED * BEATS + 1.0)
            row.pulses = await pulsing
            row.honest = await self._since()
            await watching
            told_health, _ = await asyncio.wait_for(probe.communicate(b""), LIMIT + PATIENCE)
        _take_health(row, json.loads(told_health))
        row.lag, row.moved = await server.lag(), server.moved(since)
        row.false_alarms = false_alarms(self.got[told_before:], "honest-", "rotated")
        row.answers = await self._answers()
        for task in running:
            task.cancel()
        return row

    async def _answers(self) -> bool:
        async with helper("probe", self.server.health, "/health") as probe:
            await asyncio.sleep(2.0)
            said, _ = await asyncio.wait_for(probe.communicate(b""), LIMIT + PATIENCE)
        return bool(json.loads(said)["failed"] == 0)

    async def _memory(self, row: Row, attacking: "asyncio.Task[Any]") -> None:
        """Look at it until the attack is over and it is back, or has been given its time."""
        end = float("inf")
        while time.monotonic() < end:
            row.after = self.server.memory()
            row.most = max(row.most, row.after)
            if attacking.done():
                end = min(end, time.monotonic() + BACK)
                if row.after <= row.before + NEAR:
                    return
            await asyncio.sleep(0.2)

    async def _pulses(self, attacking: "asyncio.Task[Any]") -> float | None:
        """The share of pulses of the tunnel `rotated` that are answered."""
        if not self.rotated.echo:
            return None
        ident, key = (bytes.fromhex(self.rotated.echo[word]) for word in ("id", "key"))
        run, sent, loop = int.from_bytes(secrets.token_bytes(4)), 0, asyncio.get_running_loop()
        heard: set[int] = set()
        with udp() as sock:
            while not attacking.done():
                sent += 1
                asked = pulse.request(ident, key, run=run, number=sent)
                with contextlib.suppress(OSError):
                    sock.sendto(asked, ("127.0.0.1", self.server.api))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        while True:
                            if answer := pulse.read_reply(await loop.sock_recv(sock, 2048), ident, run, key):
                                heard.add(answer[0])
        return len(heard) / sent if sent else None


def _take_health(row: Row, told: dict[str, Any]) -> None:
    row.health_failed = told["failed"]
    row.health = statistics.median(told["times"]) if told["times"] else None
    row.health_worst = LIMIT if told["failed"] else max(told["times"], default=LIMIT)


async def _on_an_agent(tree: Path, label: str, seconds: float, addresses: int) -> Row:
    """An agent's own port, attacked from beside it."""
    row = Row(attack="agent", addresses=addresses, tree=label, seconds=seconds)
    agent = WatchedAgent(tree)
    try:
        await asyncio.sleep(8.0)
        row.before = row.most = agent.memory()
        async with helper("probe", agent.health, "/client/health", before=agent.inside) as probe:
            ran, waited = agent.ran()
            attacking = asyncio.create_task(
                attackers(["agent"], seconds, {"addresses": addresses, "agent": agent.health}, agent.inside)
            )
            while not attacking.done():
                row.most = max(row.most, agent.memory())
                await asyncio.sleep(0.2)
            did = await attacking
            row.sent, row.attackers = did["sent"], did["cpu"] / seconds
            row.loop, row.waited = (
                (now - then) / seconds for now, then in zip(agent.ran(), (ran, waited), strict=True)
            )
            said, _ = await asyncio.wait_for(probe.communicate(b""), LIMIT + PATIENCE)
        _take_health(row, json.loads(said))
        row.after = agent.memory()
    finally:
        agent.stop()
    return row


async def _besiege(
    tree: Path, label: str, attacks: Sequence[str], seconds: float, addresses: int, note: Callable[[Row], None]
) -> None:
    """Try all of `attacks`; a server that did not recover from one is replaced."""
    if "agent" in attacks:
        note(await _on_an_agent(tree, label, seconds, addresses))
    for tls in (False, True):
        left = [a for a in attacks if a not in ALONE and (a in OVER_TLS) == tls]
        while left:
            async with Siege(tree, label, tls=tls).stands() as siege:
                while left:
                    row = await siege.under(left.pop(0), seconds, addresses)
                    note(row)
                    if not row.answers or row.after > row.before + GOALS["memory"]:
                        break


def _cells(row: Row) -> list[str]:
    def seconds(value: float | None, goal: str = "") -> str:
        text = "never" if value is None else f"{value:.2f} s"
        return f"**{text}**" if value is None or value > GOALS.get(goal, float("inf")) else text

    on_agent = row.attack in ALONE
    told = ["–"] * 4
    if not on_agent:
        told = [seconds(row.leak, "leak"), seconds(row.down), seconds(row.late, "late"), seconds(row.newcomer)]
    health = f"{seconds(row.health)} / {seconds(row.health_worst, 'health')}"
    if row.health_failed:
        health += f", **{row.health_failed} unanswered**"
    memory = f"{row.before:.0f} / {row.most:.0f} / {row.after:.0f} MB"
    memory = f"**{memory}**" if "memory" in row.missed() else memory
    moved = f"**{row.moved[0]}, by {row.moved[1]:.0f} s**" if row.moved[0] else "0"
    alarms = f"**{row.false_alarms}**" if row.false_alarms else "0"
    loop = f"{row.loop:.0%} / {row.waited:.0%}" + ("" if row.lag is None else f"; late {row.lag:.2f} s")
    honest = "–" if on_agent else f"{1000 * row.honest.get('p99', 0):.0f} ms, {row.honest.get('lost', 0):.0f} lost"
    if row.pulses is not None:
        honest += f"; {row.pulses:.0%}"
    sent = ", ".join(f"{many(n, row.seconds, what)}" for what, n in row.sent.items()) + f"; {row.attackers:.0%}"
    tree = row.tree + ("" if row.answers else ", **stopped answering**")
    return [row.attack, str(row.addresses), tree, *told, health, memory, moved, alarms, loop, sent, honest]


def many(count: int, seconds: float, what: str) -> str:
    if what == "bytes":
        return f"{count / seconds / 1e6:.1f} MB/s"
    return f"{count / seconds:,.0f} {what}/s" if count >= seconds else f"{count} {what}"


_HEAD = (
    "attack", "from", "tree", "leak → message", "down → message", "silence late by", "new agent heard after",
    "/health, median / worst", "memory, before / most / after", "deadlines moved", "false alarms",
    "loop ran / waited", "attack, its CPU", "honest p99, lost; pulses answered",
)  # fmt: skip


def _page(rows: Sequence[Row]) -> str:
    lines = ["# Siege", ""]
    for label in dict.fromkeys(row.tree for row in rows):
        of = [row for row in rows if row.tree == label]
        missed = Counter(goal for row in of for goal in row.missed())
        figures = [
            f"leak → message {_worst(r.leak for r in of if r.attack not in ALONE)}",
            f"silence late by {_worst(r.late for r in of if r.attack not in ALONE)}",
            f"/health {max(r.health_worst for r in of):.2f} s, {sum(r.health_failed for r in of)} unanswered",
            f"memory {max(r.most - r.before for r in of):+.0f} MB, and {max(r.after - r.before for r in of):+.0f} MB "
            "after a minute",
            f"deadlines moved {sum(r.moved[0] for r in of)} times",
            f"{sum(r.false_alarms for r in of)} false alarms",
            f"stopped answering after {sum(not r.answers for r in of)} of {len(of)} attacks",
        ]
        goals = ", ".join(f"{goal} in {n}" for goal, n in missed.items()) or "none"
        lines += [f"**{label}**, worst of {len(of)}: {'; '.join(figures)}. Goals missed: {goals}.", ""]
    lengths = " and ".join(sorted({f"{r.seconds:g}" for r in rows}))
    goals = f"leak → message ≤ {GOALS['leak']:g} s, silence ≤ {GOALS['late']:g} s late, /health ≤ {GOALS['health']:g} s"
    goals += f", memory ≤ +{GOALS['memory']:g} MB and back within {BACK:g} s, no deadline moved, no false alarm"
    lines += [
        f"Measured {min(r.at for r in rows)} to {max(r.at for r in rows)} UTC, attacks of {lengths} s. Goals: {goals}. "
        f"What misses one is bold. {HONEST} honest tunnels report every {INTERVAL:g} s meanwhile; one that is down "
        'is told after 2 s of grace. The server has one core, all else the other, attackers at nice 10: "loop '
        "ran / waited\" is the share of the time that the server's loop had a processor, and that it waited for one; "
        '"late" its own metric, the longest of a minute. Of `agent`, /health and memory are the agent\'s.',
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|---" * len(_HEAD) + "|",
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _worst(values: Any) -> str:
    all_ = list(values)
    known = [v for v in all_ if v is not None]
    never = len(all_) - len(known)
    return (f"{max(known):.2f} s" if known else "never") + (f", {never} never" if never and known else "")


def _load() -> dict[tuple[str, int, str], Row]:
    file = RESULTS / "siege.json"
    if not file.exists():
        return {}
    rows = (Row(**(r | {"moved": tuple(r["moved"])})) for r in json.loads(file.read_text()))
    return {(r.attack, r.addresses, r.tree): r for r in rows}


def _save(rows: dict[tuple[str, int, str], Row]) -> None:
    order = [*ALL, TOGETHER]
    trees = list(dict.fromkeys(r.tree for r in rows.values()))
    made = sorted(rows.values(), key=lambda r: (order.index(r.attack), r.addresses, trees.index(r.tree)))
    (RESULTS / "siege.json").write_text(json.dumps([asdict(r) for r in made], indent=1) + "\n")
    (RESULTS / "siege.md").write_text(_page(made))


def _label(tree: Path) -> str:
    if tree == HERE:
        return "this"
    said = subprocess.run(["git", "-C", str(tree), "describe", "--always"], capture_output=True, text=True)
    return said.stdout.strip() or tree.name


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench siege", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="attacks:\n" + "\n".join(f"  {n:<17} {(f.__doc__ or '').splitlines()[0]}" for n, f in ALL.items())
        + f"\n  {TOGETHER:<17} All but tls, handshakes and agent at once.",
    )  # fmt: skip
    parser.add_argument("--tree", action="append", type=Path, help="a source tree with its .venv; more than once")
    parser.add_argument("--only", default=",".join([*ALL, TOGETHER]), help="attacks, with commas")
    parser.add_argument("--addresses", default="1,200", help="from how many, with commas; at most 250")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each attack lasts")
    given = parser.parse_args(words)
    attacks = given.only.split(",")
    if unknown := set(attacks) - {*ALL, TOGETHER}:
        parser.error(f"no such attack: {', '.join(sorted(unknown))}")
    rows = _load()
    leave_a_core()

    def note(row: Row) -> None:
        row.at = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
        rows[row.attack, row.addresses, row.tree] = row
        _save(rows)
        missed = ", ".join(row.missed())
        print("| " + " | ".join(_cells(row)) + " |" + (f" misses: {missed}" if missed else ""), flush=True)

    print("| " + " | ".join(_HEAD) + " |", flush=True)
    for tree in given.tree or [HERE]:
        place = tree.resolve()
        for addresses in map(int, given.addresses.split(",")):
            asyncio.run(_besiege(place, _label(place), attacks, given.seconds, addresses, note))


if __name__ == "__main__":
    main(sys.argv[1:])
