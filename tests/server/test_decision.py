"""The pure core of the one transaction: a commit that fails leaves no trace, and deciding twice comes to the same."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.test_tracker import BLIND, DEAD, EXIT, HOME, LEAK, OTHER_EXIT, POLICY, START, WELL, saw
from vpn_sentinel.domain.observation import Answer, PortCheck
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.server.store import rows
from vpn_sentinel.server.store.store import TunnelRow
from vpn_sentinel.server.tracking.decision import Context, Decision, decide, decide_silences
from vpn_sentinel.server.tracking.inputs import (
    Input,
    PortCheckResult,
    PulseObservation,
    ReportBatch,
    TimedObservation,
)
from vpn_sentinel.server.tracking.knowledge import Knowledge
from vpn_sentinel.server.tracking.sites import Reference, Sites

NAMES = ("nl", "ch", "home")
FORWARDING = replace(WELL, forwarded_port=51413)
REFUSED = PortCheck(address=ip_address(EXIT), port=51413, answer=Answer.LOST)


@dataclass(frozen=True)
class Step:
    """Inputs at one time, or none: then the deadlines are looked at. `fails` says that the commit does.

    `odd` are the names of rows that hold what this version cannot read.
    """

    inputs: tuple[Input, ...]
    now: float
    fails: bool
    odd: frozenset[str]


def report(
    name: str, at: float, seen: Any, *, old: bool, version: str, spool: str, peer: str, site: str
) -> ReportBatch:
    reference = name == "home" and version == "1.1"
    policy = Policy(allowed_outside=(ip_network("192.0.2.0/24"),)) if peer == HOME else Policy()
    agent: dict[str, Any] = {"spool": spool, "policy": policy, "peer": ip_address(peer), "site": site}
    return ReportBatch(
        tunnel=name,
        received_at=at,
        silent_after=31.0,
        interval=10.0,
        version=version,
        observations=(TimedObservation(seq=int(at - START) + 1, at=at, observation=seen),),
        role="reference" if reference else "tunnel",
        **({} if old and not reference else agent),
    )


@st.composite
def reports(draw: st.DrawFn, name: str, at: float) -> ReportBatch:
    seen = draw(st.sampled_from((WELL, WELL, WELL, LEAK, DEAD, BLIND, FORWARDING, saw(OTHER_EXIT))))
    old, version = draw(st.booleans()), draw(st.sampled_from(("1.0", "1.1")))
    spool, site = draw(st.sampled_from(("s1", "s2"))), draw(st.sampled_from(("flat", "flat", "attic")))
    peer = draw(st.sampled_from((EXIT, EXIT, HOME)))
    return report(name, at, seen, old=old, version=version, spool=spool, peer=peer, site=site)


@st.composite
def own_news(draw: st.DrawFn, name: str, at: float) -> Input:
    address = ip_address(draw(st.sampled_from((EXIT, HOME))))
    pulses = PulseObservation(tunnel=name, address=address, unheard=draw(st.booleans()), at=at)
    port = PortCheckResult(tunnel=name, check=REFUSED, at=at)
    return pulses if draw(st.booleans()) else port


@st.composite
def sequences(draw: st.DrawFn) -> list[Step]:
    at, steps = START, []
    for _ in range(draw(st.integers(3, 14))):
        at += draw(st.sampled_from((1.0, 5.0, 40.0)))
        kind = draw(st.sampled_from((reports, reports, reports, own_news, None)))
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))
        entering = [draw(kind(name, at)) for name in names] if kind is not None else []
        odd = draw(st.sampled_from((frozenset(), frozenset(), frozenset({"nl"}))))
        steps.append(Step(tuple(entering), at, draw(st.booleans()), odd))
    return steps


class World:
    """Rows, and what the process knows, without a database: what is committed is kept, all else is dropped."""

    def __init__(self) -> None:
        self.rows: dict[str, TunnelRow] = {}
        self.known = Knowledge(Sites())
        self.committed: list[Any] = []

    def take(self, step: Step) -> None:
        before = self.facts()
        try:
            decision, found = self.decide(step)
        except msgspec.ValidationError:  # of an odd row: the inputs are tried one by one then
            assert self.facts() == before
            return
        again, found_again = self.decide(step)
        assert (said(decision), found) == (said(again), found_again)
        assert self.facts() == before
        for name, _ in decision.effects.failures:
            assert replace(found[name], deadline=None) == replace(self.seen(step)[name], deadline=None)
        if not step.fails:
            self.rows |= found
            self.known.apply(decision.effects.draft)
            self.committed.append(said(decision))
            assert self.known.sites._by_site == by_site(self.known.sites._by_name)

    def seen(self, step: Step) -> dict[str, TunnelRow]:
        """The rows as the step's transaction reads them."""
        found = {name: replace(row) for name, row in self.rows.items()}
        for name in step.odd & found.keys():
            found[name].place = '{"height": 1.5}'
        return found

    def decide(self, step: Step) -> tuple[Decision, dict[str, TunnelRow]]:
        found = self.seen(step)
        context = Context(now=step.now, clock_moved=0.0, policy=POLICY, keepalive_policy=POLICY, channels=("telegram",))
        if not step.inputs:
            return decide_silences(found.values(), self.known, context, 0.0, ()), found
        for entering in step.inputs:
            if isinstance(entering, ReportBatch) and entering.tunnel not in found:
                values: Any = rows.new_tunnel(entering.tunnel, START)
                found[entering.tunnel] = TunnelRow(NAMES.index(entering.tunnel) + 1, *values)
        return decide(step.inputs, found, self.known, context), found

    def facts(self) -> tuple[Any, ...]:
        """All that a later decision may depend on."""
        known = self.known
        tables: tuple[Mapping[str, Any], ...] = (
            known.repeats,
            known.pulse_addresses,
            known.beside_tunnel,
            known.sources,
            known.forwarded,
            known.sites._by_name,
            known.sites._by_site,
        )
        return (*(dict(t) for t in tables), {n: replace(r) for n, r in self.rows.items()})


def by_site(by_name: Mapping[str, Reference]) -> dict[str, dict[str, Reference]]:
    found: dict[str, dict[str, Reference]] = {}
    for name, reference in by_name.items():
        found.setdefault(reference.site, {})[name] = reference
    return found


def said(decision: Decision) -> tuple[Any, ...]:
    effects = decision.effects
    failures = [repr(e) for _, e in effects.failures]
    outside = (effects.tunnels, effects.state_changes, effects.shared, effects.has_deliveries, failures)
    return ([(sql, list(values)) for sql, values in decision.batches], *outside)


@given(sequences())
@settings(max_examples=150)
def test_commits_that_fail_leave_no_trace(steps: list[Step]) -> None:
    with_failures, without = World(), World()
    for step in steps:
        with_failures.take(step)
        if not step.fails:
            without.take(step)
    assert with_failures.committed == without.committed
    assert with_failures.facts() == without.facts()
