"""Hours at 80 % of what a server takes, an attack each minute: does it grow, do the honest wait?

    python -m bench endure [--minutes 120] [--seconds 20] [--only NAMES] [--addresses 200]

First the peak is looked for: how many honest reports a second the server takes while so many messages are always on
their way, and then with how many of these, made at a steady rate, it acknowledges 99 in 100 within 50 ms. 80 % of that
are sent. Where the server's core was idle meanwhile, who reports was too slow, and not the server: then the rate is set
so that the core is busy for 80 % of the time.

Reports come by the WebSockets of 1,000 tunnels: that is how agents send them, each is judged and committed before it is
acknowledged, and no limit has to be lifted for it, as it would for POST. One of the attacks of the siege begins each
minute (three times `--seconds`), from 200 addresses, and lasts for 20 s; the rest of the minute is calm. `tls`,
`handshakes` and `agent` are left out: they are aimed at another server, or at an agent.

Measured: how long each report took from when it was made until it was acknowledged, in an attack and outside of it;
lost ones; the server's memory, descriptors and database at the end of each minute; moved deadlines; messages that an
honest tunnel is not well; /health. The database keeps its reports for a quarter of an hour, the least that may be set,
so that it is full within the run and old reports go while new ones come.

The server has a core of its own; attackers, the honest and this process share the other, attackers at nice 10. How late
reports were made stands beside. Use a network namespace of its own (`unshare -n`, and `ip link set lo up`). Writes
bench/results/endure.json and endure.md after each minute; Ctrl-C ends it, with what was measured until then.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import cycle, islice
from typing import Any, Final, TypeVar

from bench.agent import cpu_seconds
from bench.siege.attacks import ALL
from bench.siege.fleet import Histogram, Told
from bench.siege.probe import EVERY, fetch
from bench.siege.run import ALONE, HERE, OVER_TLS, RESULTS, Got, attackers, false_alarms, helper, many, until
from bench.siege.server import Server, Sink, idle, leave_a_core

TUNNELS: Final = 1000
SHARE: Final = 0.8
FLIGHT: Final = 64  # messages on their way, as in the measurement of ingest
FINDING: Final = 6.0  # seconds for each step of looking for the peak
IDLE: Final = 0.05  # of the server's core: more, and the server was not what held the reports up
LEAST: Final = 3  # tenths of the peak that are tried; if latency runs away even there, the machine is not its own
STEPS: Final = 3  # by which the rate is corrected, where it is found by processor time
DAYS: Final = "0.01"  # that reports are kept
P99: Final = 0.05  # seconds
GROWTH: Final = 10.0  # MB, and MB an hour, or so many descriptors, that are none
ROUNDS: Final = 3  # of all attacks, below which nothing is said of growth: one to get warm, and two to compare
T = TypeVar("T")


@dataclass(kw_only=True)
class Phase:
    """20 s of an attack, or the calm behind it.

    Shares of the time: that the server was `busy`, all threads; that its core was `idle`; and that its loop `waited`
    for the core. Seconds that /health took at most.
    """

    told: Told = field(default_factory=Told)
    busy: float = 0.0
    idle: float = 0.0
    waited: float = 0.0
    health: float = 0.0
    health_failed: int = 0

    @property
    def took(self) -> Histogram:
        return Histogram(self.told.took, self.told.worst)


@dataclass(kw_only=True)
class Minute:
    """MB at its end, `most` within it; `moved` are times and seconds."""

    attack: str
    under: Phase
    calm: Phase
    memory: float = 0.0
    most: float = 0.0
    disk: float = 0.0
    descriptors: int = 0
    moved: tuple[int, float] = (0, 0.0)
    alarms: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    attackers: float = 0.0


@dataclass(kw_only=True)
class Peak:
    """Reports a second: `taken` with so many always on their way, `steady` those that are soon acknowledged at a steady
    rate, None where it is not the server that is slow. `busy`, `idle`: shares of the time while it took them.
    """

    taken: float
    steady: float | None
    busy: float
    idle: float
    p99: float
    rate: float
    steady_p99: float = 0.0

    @property
    def limited(self) -> bool:
        """Whether it was the server's core that held them up."""
        return self.idle <= IDLE


@dataclass(kw_only=True)
class Run:
    began: str
    seconds: float
    addresses: int
    peak: Peak
    minutes: list[Minute] = field(default_factory=list)
    made: int = 0
    lost: int | None = None  # None until it is over


class Fleet:
    """The process of `bench.siege.fleet`, spoken to."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._to, self._from = process.stdin, process.stdout
        self._told: dict[int, asyncio.Future[Told]] = {}
        self._window = 0
        self._all: asyncio.Future[dict[str, int]] = asyncio.get_running_loop().create_future()

    async def listen(self) -> None:
        """Raises RuntimeError when it ends before its time."""
        async for line in self._from:
            said = json.loads(line)
            if "number" in said:
                self._told.pop(said["number"]).set_result(Told(**said))
            else:
                self._all.set_result(said)
                return
        raise RuntimeError("the honest ended by themselves")

    def begin(self, **how: float) -> "asyncio.Future[Told]":
        """Begin a window; what is returned ends with what became of the one before."""
        future = self._told[self._window] = asyncio.get_running_loop().create_future()
        self._window += 1
        self._to.write(json.dumps(how).encode() + b"\n")
        return future

    async def end(self) -> tuple[int, int]:
        """How many reports were made in all, and how many of them were lost."""
        self._to.close()
        said = await self._all
        return said["made"], said["lost"]


class Endurance:
    """One server that is loaded and attacked."""

    def __init__(self, server: Server, fleet: Fleet, got: Got) -> None:
        self._server, self._fleet, self._got = server, fleet, got
        self._health: list[float | None] = []
        self._most = 0.0
        self._token = self._old_token = ""

    async def look(self) -> None:
        """Ask for its health, and look at its memory, for ever."""
        while True:
            began = time.monotonic()
            try:
                await asyncio.to_thread(fetch, self._server.health, "/health")
                self._health.append(time.monotonic() - began)
            except OSError:
                self._health.append(None)
            self._most = max(self._most, self._server.memory())
            await asyncio.sleep(EVERY)

    async def _phase(self, lasts: Awaitable[T]) -> tuple[Phase, T]:
        pid = self._server.process.pid
        self._health.clear()
        began, before = time.monotonic(), (cpu_seconds(pid), idle(), self._server.ran()[1])
        done = await lasts
        took = time.monotonic() - began
        now = cpu_seconds(pid), idle(), self._server.ran()[1]
        busy, spare, waited = ((n - b) / took for n, b in zip(now, before, strict=True))
        times = [t for t in self._health if t is not None]
        phase = Phase(busy=busy, idle=spare, waited=waited, health=max(times, default=0.0))
        phase.health_failed = len(self._health) - len(times)
        return phase, done

    async def _try(self, **how: float) -> Phase:
        """For some seconds."""
        await self._fleet.begin(**how)
        phase, _ = await self._phase(asyncio.sleep(FINDING))
        phase.told = await self._fleet.begin()
        return phase

    async def peak(self) -> Peak:
        await self._try(flight=FLIGHT)  # warm
        phase = await self._try(flight=FLIGHT)
        taken = phase.told.made / phase.told.seconds
        peak = Peak(taken=taken, steady=None, busy=phase.busy, idle=phase.idle, p99=phase.took.at(0.99), rate=0.0)
        if peak.limited:
            for tenths in range(10, LEAST - 1, -1):
                steady = taken * tenths / 10
                p99 = (await self._try(rate=steady)).took.at(0.99)
                peak.steady, peak.steady_p99, peak.rate = steady, p99, SHARE * steady
                if p99 < P99:
                    break
        else:
            peak.rate = SHARE * taken / (1 - phase.idle)
            for _ in range(STEPS):
                peak.rate *= SHARE / (1 - (await self._try(rate=peak.rate)).idle)
        return peak

    async def _attack(self, attack: str, seconds: float, addresses: int) -> dict[str, Any]:
        server = self._server
        at = {"api": server.api, "health": server.health, "dashboard": server.dashboard, "canary": server.canary}
        keys = {"token": self._token, "old_token": self._old_token}
        running = asyncio.create_task(attackers([attack], seconds, {"addresses": addresses} | at | keys))
        try:
            if attack == "revoked":
                await asyncio.sleep(seconds / 4)
                await asyncio.to_thread(server.command, "token", "revoke", "rotated")
                self._old_token = await asyncio.to_thread(server.token, "rotated")
            return await running
        finally:
            running.cancel()

    async def minutes(self, run: Run, attacks: Sequence[str], note: Callable[[Minute], None]) -> None:
        """`note` is called with each, in order, once all of its reports are acknowledged or given up."""
        server, fleet, rate = self._server, self._fleet, run.peak.rate
        self._token, self._old_token = [await asyncio.to_thread(server.token, who) for who in ("rogue", "rotated")]
        await fleet.begin(rate=rate)
        self._got.clear()
        noted: asyncio.Task[None] | None = None
        for last, attack in [(n == len(attacks) - 1, attack) for n, attack in enumerate(attacks)]:
            end, said = time.monotonic() + 3 * run.seconds, len(server.said())
            self._most = 0.0
            under, did = await self._phase(self._attack(attack, run.seconds, run.addresses))
            of_attack = fleet.begin(rate=rate)
            calm, _ = await self._phase(asyncio.sleep(end - time.monotonic()))
            of_calm = fleet.begin(rate=0.0 if last else rate)
            memory = server.memory()
            minute = Minute(
                attack=attack, under=under, calm=calm, memory=memory, most=max(memory, self._most), disk=server.disk(),
                descriptors=server.descriptors(), moved=server.moved(said), alarms=false_alarms(self._got, "honest-"),
                sent=did["sent"], attackers=did["cpu"] / run.seconds,
            )  # fmt: skip
            self._got.clear()
            if noted is not None:
                await noted
            noted = asyncio.create_task(_noted(minute, of_attack, of_calm, note))
        if noted is not None:
            await noted
        run.made, run.lost = await fleet.end()


async def _noted(
    minute: Minute, of_attack: Awaitable[Told], of_calm: Awaitable[Told], note: Callable[[Minute], None]
) -> None:
    minute.under.told, minute.calm.told = await of_attack, await of_calm
    note(minute)


async def endure(attacks: Sequence[str], seconds: float, addresses: int, note: Callable[[Run], None]) -> None:
    """`note` is called after each minute, and at the end."""
    got: Got = []
    sink = await asyncio.get_running_loop().create_server(lambda: Sink(got), "127.0.0.1", 0)
    server = Server(HERE, sink.sockets[0].getsockname()[1], tls=False, more={"VPN_SENTINEL_RETENTION_DAYS": DAYS})
    try:
        if not await until(lambda: "server started" in server.said(), 30):
            raise RuntimeError(f"the server does not start: {server.said()[-500:]}")
        async with helper("fleet", server.api, server.key, TUNNELS) as process, asyncio.TaskGroup() as group:
            fleet = Fleet(process)
            group.create_task(fleet.listen())
            endurance = Endurance(server, fleet, got)
            looking = group.create_task(endurance.look())
            await fleet.begin(rate=TUNNELS / 5.0)
            if not await until(lambda: len(got) > TUNNELS, 60):
                raise RuntimeError(f"{len(got)} messages instead of one for each tunnel: {server.said()[-500:]}")
            peak = await endurance.peak()
            run = Run(began=f"{datetime.now(UTC):%Y-%m-%d %H:%M}", seconds=seconds, addresses=addresses, peak=peak)
            note(run)

            def take(minute: Minute) -> None:
                run.minutes.append(minute)
                note(run)

            await endurance.minutes(run, attacks, take)
            note(run)
            looking.cancel()
    finally:
        server.stop()
        sink.close()


def slope(values: Sequence[float]) -> float:
    """By how much one is more than the one before it, by least squares; 0 of fewer than two."""
    return statistics.linear_regression(range(len(values)), values).slope if len(values) > 1 else 0.0


def growth(values: Sequence[float], attacks: int) -> tuple[float, float]:
    """How much more the last quarter of them is than the first, on average, and the slope of the second half.

    Of their means over one round of so many attacks each: what one attack takes and gives back is no growth.
    """
    means = [statistics.mean(values[n : n + attacks]) for n in range(max(1, len(values) - attacks + 1))]
    quarter = max(1, len(means) // 4)
    return statistics.mean(means[-quarter:]) - statistics.mean(means[:quarter]), slope(means[len(means) // 2 :])


def missed(run: Run) -> list[str]:
    """What is not as it should be; of growth only where the run is long enough to tell it."""
    calm = together(m.calm.took for m in run.minutes)
    found = {f"p99 outside of attacks is {_ms(calm.at(0.99))}": calm.at(0.99) >= P99}
    if long_enough(run):
        for what, values in (("memory", [m.memory for m in run.minutes]), ("descriptors", _descriptors(run))):
            more, an_hour = _grew(run, values)
            found[f"{what} grows by {more:.0f} and by {an_hour:.0f} an hour"] = more > GROWTH or an_hour > GROWTH
    found["reports were lost"] = bool(run.lost)
    found["deadlines were moved"] = any(m.moved[0] for m in run.minutes)
    found["false alarms"] = any(m.alarms for m in run.minutes)
    return [what for what, is_so in found.items() if is_so]


def _grew(run: Run, values: Sequence[float]) -> tuple[float, float]:
    """`growth` after the first round of all attacks, in which each takes what it needs; its slope by the hour."""
    attacks = len({m.attack for m in run.minutes})
    more, each = growth(values[attacks:] or values, attacks)
    return more, each * 3600 / (3 * run.seconds)


def long_enough(run: Run) -> bool:
    return min(Counter(m.attack for m in run.minutes).values(), default=0) >= ROUNDS


def together(all_: Iterable[Histogram]) -> Histogram:
    whole = Histogram()
    for one in all_:
        whole.take(one)
    return whole


def _descriptors(run: Run) -> list[float]:
    return [float(m.descriptors) for m in run.minutes]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def _times(phases: Sequence[Phase], goal: float = float("inf")) -> str:
    took = together(p.took for p in phases)
    if not sum(p.told.made for p in phases):
        return "–"
    p99 = f"**{_ms(took.at(0.99))}**" if took.at(0.99) >= goal else _ms(took.at(0.99))
    unanswered = sum(p.told.unanswered for p in phases)
    return f"{_ms(took.at(0.5))} / {p99} / {_ms(took.worst)}" + (f", {unanswered} unanswered" if unanswered else "")


def _health(phases: Sequence[Phase]) -> str:
    failed = sum(p.health_failed for p in phases)
    return f"{max(p.health for p in phases):.2f} s" + (f", {failed} unanswered" if failed else "")


_HEAD: Final = (
    "attack", "minutes", "in it: p50 / p99 / worst", "outside: p50 / p99 / worst", "slow seconds outside",
    "busy, in / out", "core idle, in / out", "loop waited, in / out", "made late by (p99), in / out",
    "/health worst, in / out", "memory, most / after", "deadlines moved", "false alarms",
    "connections lost", "attack, its CPU",
)  # fmt: skip


def _cells(minutes: Sequence[Minute]) -> list[str]:
    under, calm = [m.under for m in minutes], [m.calm for m in minutes]
    both = (under, calm)
    sent = Counter[str]()
    for minute in minutes:
        sent.update(minute.sent)
    seconds = sum(p.told.seconds for p in under)
    return [
        minutes[0].attack if len({m.attack for m in minutes}) == 1 else "all",
        str(len(minutes)),
        _times(under),
        _times(calm, P99),
        f"{sum(len(p.told.slow) for p in calm)} of {sum(p.told.seconds for p in calm):.0f}",
        " / ".join(f"{statistics.mean(p.busy for p in phases):.0%}" for phases in both),
        " / ".join(f"{statistics.mean(p.idle for p in phases):.0%}" for phases in both),
        " / ".join(f"{statistics.mean(p.waited for p in phases):.0%}" for phases in both),
        " / ".join(_ms(max(p.told.behind for p in phases)) for phases in both),
        " / ".join(map(_health, both)),
        f"{max(m.most for m in minutes):.0f} / {minutes[-1].memory:.0f} MB",
        f"{sum(m.moved[0] for m in minutes)}, by {sum(m.moved[1] for m in minutes):.0f} s",
        str(sum(m.alarms for m in minutes)),
        " / ".join(str(sum(p.told.cut for p in phases)) for phases in both),
        ", ".join(many(n, seconds, what) for what, n in sent.items())
        + f"; {statistics.mean(m.attackers for m in minutes):.0%}",
    ]


def page(run: Run) -> str:
    """The results as Markdown."""
    peak, minutes = run.peak, run.minutes
    if peak.steady is not None:
        why = f"at a steady {peak.steady:,.0f} a second p99 is {_ms(peak.steady_p99)}, and the rate is 80 % of that"
    else:
        why = "who reports was too slow, and the rate is that at which the core is busy for 80 % of the time"
    lines = [
        "# Endurance",
        "",
        f"Begun {run.began} UTC, {len(minutes)} rounds of {3 * run.seconds:g} s, in each one attack of {run.seconds:g} "
        f"s from {run.addresses} addresses. **{peak.rate:,.0f} honest reports a second** by {TUNNELS:,} WebSockets. "
        f"With {FLIGHT} messages always on their way the server took {peak.taken:,.0f} a second (p99 {_ms(peak.p99)}), "
        f"busy for {peak.busy:.0%} of the time and its core idle for {peak.idle:.0%}: {why}.",
        "",
    ]
    if not minutes:
        return "\n".join(lines)
    lines += [_verdict(run), "", "| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    for attack in dict.fromkeys(m.attack for m in minutes):
        lines.append("| " + " | ".join(_cells([m for m in minutes if m.attack == attack])) + " |")
    lines += [
        "| " + " | ".join(_cells(minutes)) + " |",
        "",
        "Times are from when a report was made until it was acknowledged; what waits while one message is on its way "
        "goes with the next, as agents do it. A second is slow when more than one in a hundred reports made in it took "
        "longer than 50 ms. `busy` is the server's processor time, all threads; `core idle` what nobody used of its "
        "core; `loop waited` the time for which its loop could have run and had no processor; `made late` is how late "
        "who reports was to make them.",
        "",
        "At the end of each round, MB of memory, MB of database, descriptors: "
        + "; ".join(f"{m.memory:.0f}, {m.disk:.0f}, {m.descriptors}" for m in minutes) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _verdict(run: Run) -> str:
    more, an_hour = _grew(run, [m.memory for m in run.minutes])
    calm = together(m.calm.took for m in run.minutes)
    lost = "not known: the run was ended before its time" if run.lost is None else f"{run.lost} of {run.made:,}"
    grew = f"memory after the first round of attacks {more:+.1f} MB from the first quarter to the last"
    grew += f", {an_hour:+.1f} MB an hour in the second half"
    if not long_enough(run):
        grew += " (too short to tell growth: each attack is to come three times)"
    wrong = "; ".join(missed(run)) or "none"
    return f"**Goals missed: {wrong}.** p99 outside of attacks {_ms(calm.at(0.99))}; {grew}; reports lost: {lost}."


def main(words: Sequence[str] = ()) -> None:
    usual = [name for name in ALL if name not in (*OVER_TLS, *ALONE)]
    parser = argparse.ArgumentParser(
        prog="python -m bench endure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120.0, help="in all, without the search for the peak")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each attack; twice as many are calm")
    parser.add_argument("--only", default=",".join(usual), help="attacks, with commas")
    parser.add_argument("--addresses", type=int, default=200, help="from how many; at most 250")
    given = parser.parse_args(words)
    names = given.only.split(",")
    if unknown := set(names) - set(usual):
        parser.error(f"no such attack here: {', '.join(sorted(unknown))}")
    count = max(1, round(60 * given.minutes / (3 * given.seconds)))
    leave_a_core()
    last: list[Run] = []

    def note(run: Run) -> None:
        last[:] = [run]
        (RESULTS / "endure.json").write_text(json.dumps(asdict(run)) + "\n")
        (RESULTS / "endure.md").write_text(page(run))
        if not run.minutes:
            print(page(run), "| " + " | ".join(_HEAD) + " |", sep="", flush=True)
        elif run.lost is None:
            print("| " + " | ".join(_cells(run.minutes[-1:])) + " |", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(endure(list(islice(cycle(names), count)), given.seconds, given.addresses, note))
    if last and last[0].minutes:
        print(_verdict(last[0]))
    sys.exit(1 if not last or last[0].lost is None or missed(last[0]) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
