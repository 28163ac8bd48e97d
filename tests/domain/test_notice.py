"""What people hear of a tunnel's life, and what they are spared."""

from dataclasses import replace
from ipaddress import ip_address

import pytest

from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.machine import Memory, advance, overdue, silence_finding
from vpn_sentinel.domain.notice import Kind, Notice, notices
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Probe, Trigger
from vpn_sentinel.domain.policy import IPAddress, Policy
from vpn_sentinel.domain.verdict import Code, Finding, State, Verdict
from vpn_sentinel.server.notify.text import plain

POLICY = Policy(grace_down=4.0, grace_degraded=15.0, grace_recovery=4.0)
FIRST, SECOND = ip_address("146.70.1.2"), ip_address("146.70.9.9")
FIRST6, SECOND6 = ip_address("2a0d:5600::2"), ip_address("2a0d:5600::9")
L, D, G, U, P = State.LEAKING, State.DOWN, State.DEGRADED, State.UNKNOWN, State.PROTECTED
CODE = {L: Code.IP_LEAK, D: Code.NO_TRAFFIC, G: Code.DNS_DOWN, U: Code.NOTHING_SEEN}


class Tunnel:
    """A tunnel whose agent reports, goes quiet and comes back, and the people who are told of it."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.heard: list[Notice] = []

    def reports(self, *rounds: tuple[float, State], caught_up: bool = True, exits: tuple[IPAddress, ...] = ()) -> None:
        """One message of the agent, with the rounds that it holds."""
        pair = tuple(next((e for e in exits if e.version == v), None) for v in (4, 6))
        before, events = self.memory, []
        for at, state in rounds:
            finding = (Finding(CODE[state], f"It is {state}."),) if state in CODE else ()
            self.memory, more = advance(self.memory, Verdict(state, finding), at, POLICY, pair)  # type: ignore[arg-type]
            events += more
        self._hear(*notices(before, self.memory, events, caught_up=caught_up))

    def says_nothing_until(self, at: float) -> None:
        before = self.memory
        self.memory, events = overdue(before, at, silence_finding(before.seen_at, at))
        self._hear(*notices(before, self.memory, events, caught_up=True))

    def _hear(self, memory: Memory, out: list[Notice]) -> None:
        self.memory = memory
        self.heard += out

    @property
    def kinds(self) -> list[Kind]:
        return [n.kind for n in self.heard]


@pytest.fixture
def tunnel() -> Tunnel:
    """One that has been protected since 100, and whose people know."""
    tunnel = Tunnel()
    tunnel.reports((100.0, P), exits=(FIRST,))
    assert tunnel.kinds == [Kind.CONNECTED]
    tunnel.heard.clear()
    return tunnel


def test_a_home_connection_that_is_down_is_told_by_the_reference_agent_alone(tunnel: Tunnel) -> None:
    uplink = Finding(Code.UPLINK_DOWN, "The home connection is down.", {"reference": "down"})
    for at in (200.0, 206.0):
        before = tunnel.memory
        tunnel.memory, events = advance(before, Verdict(D, (uplink,)), at, POLICY, (None, None))
        tunnel._hear(*notices(before, tunnel.memory, events, caught_up=True))
    assert tunnel.memory.state is D
    tunnel.reports((300.0, P), (305.0, P), exits=(FIRST,))
    assert (tunnel.memory.state, tunnel.kinds) == (P, [])
    # What outlasts the home connection's outage is the tunnel's own, and told.
    tunnel.reports((400.0, D), (405.0, D))
    assert tunnel.kinds == [Kind.DOWN]


def test_a_new_tunnel_connects() -> None:
    tunnel = Tunnel()
    tunnel.reports((99.0, U))
    assert tunnel.heard == []
    tunnel.reports((100.0, P), exits=(FIRST,))
    assert tunnel.heard == [Notice(kind=Kind.CONNECTED, at=100.0, exit=FIRST)]


def test_what_rests_on_the_users_word_is_said_wherever_a_tunnel_is_called_well() -> None:
    """No VPN at all: the uplink of a container, tap0, was named as the tunnel."""
    here = Canary(
        probe=Probe.DEFAULT, target="echo", family=4, answer=Answer.ANSWERED, path=Path.TUNNEL,
        address=ip_address("91.10.22.20"),
    )  # fmt: skip
    named = Link(name="tap0", present=True, up=True, declared=True)
    seen = Observation(trigger=Trigger.TIMER, link=named, canaries=(here,))
    dead = Observation(trigger=Trigger.TIMER, link=named, canaries=(replace(here, answer=Answer.LOST, address=None),))
    tunnel = Tunnel()
    for at, one in ((100.0, seen), (200.0, dead), (204.0, dead), (300.0, seen), (304.0, seen)):
        before = tunnel.memory
        tunnel.memory, events = advance(before, judge(one, POLICY), at, POLICY, (one.exit(4), None))
        tunnel._hear(*notices(before, tunnel.memory, events, caught_up=True))
    assert tunnel.kinds == [Kind.CONNECTED, Kind.DOWN, Kind.RECOVERED]
    for told in (tunnel.heard[0], tunnel.heard[2]):
        said = plain(told)
        assert "tap0 is taken for a VPN's only because VPN_SENTINEL_TUNNEL_INTERFACE says so" in said
        assert "nothing here shows that it is one" in said
        assert "Name the VPN's own device" in said


def test_a_tunnel_that_is_well_is_not_talked_about(tunnel: Tunnel) -> None:
    for at in range(101, 200):
        tunnel.reports((float(at), P), exits=(FIRST,))
    assert tunnel.heard == []


@pytest.mark.parametrize(
    ("state", "grace", "kind"), [(L, 0.0, Kind.LEAKING), (D, 4.0, Kind.DOWN), (G, 15.0, Kind.DEGRADED)]
)
def test_each_trouble_is_told_once_and_its_end_once(tunnel: Tunnel, state: State, grace: float, kind: Kind) -> None:
    for at in range(31):
        tunnel.reports((200.0 + at, state))
    assert tunnel.kinds == [kind]
    began = tunnel.heard[0]
    assert (began.at, began.began, began.exit, began.outage) == (200.0, 200.0, FIRST, None)
    assert began.findings[0].code is CODE[state]
    for at in range(31):
        tunnel.reports((300.0 + at, P), exits=(FIRST,))
    assert tunnel.kinds == [kind, Kind.RECOVERED]
    ended = tunnel.heard[1]
    assert (ended.at, ended.began, ended.was, ended.outage, ended.old_exit) == (300.0, 200.0, state, 100.0, None)


def test_trouble_shorter_than_its_grace_is_not_told_and_neither_is_its_end(tunnel: Tunnel) -> None:
    tunnel.reports((200.0, D))
    tunnel.reports((203.0, D))
    tunnel.reports((204.0, P), exits=(FIRST,))
    tunnel.reports((300.0, P), exits=(FIRST,))
    assert tunnel.heard == []


def test_trouble_that_grows_worse_is_told_again_and_ends_once(tunnel: Tunnel) -> None:
    tunnel.reports((200.0, G), (215.0, G))
    tunnel.reports((220.0, D), (224.0, D))
    tunnel.reports((230.0, L))
    tunnel.reports((240.0, D), (244.0, D))
    tunnel.reports((250.0, P), (254.0, P))
    assert tunnel.kinds == [Kind.DEGRADED, Kind.DOWN, Kind.LEAKING, Kind.DOWN, Kind.RECOVERED]
    ended = tunnel.heard[-1]
    assert (ended.began, ended.at, ended.outage) == (200.0, 250.0, 50.0)
    # The leak was the worst of it, though the tunnel was merely down in the end.
    assert ended.was is L


def test_the_next_outage_does_not_remember_the_last(tunnel: Tunnel) -> None:
    tunnel.reports((200.0, L), (210.0, P), (214.0, P))
    tunnel.heard.clear()
    tunnel.reports((300.0, D), (304.0, D))
    tunnel.reports((310.0, P), (314.0, P))
    assert [(n.kind, n.was, n.began) for n in tunnel.heard] == [
        (Kind.DOWN, None, 300.0),
        (Kind.RECOVERED, D, 300.0),
    ]


def test_a_leak_within_one_message_is_told_with_its_end(tunnel: Tunnel) -> None:
    tunnel.reports((200.0, L), (201.0, P), (205.0, P))
    assert [(n.kind, n.at, n.outage) for n in tunnel.heard] == [
        (Kind.LEAKING, 200.0, None),
        (Kind.RECOVERED, 201.0, 1.0),
    ]


def test_a_leak_that_comes_and_goes_within_one_message_is_told_once(tunnel: Tunnel) -> None:
    tunnel.reports((200.0, L), (201.0, P), (205.0, P), (206.0, L), (207.0, P), (211.0, P))
    assert tunnel.kinds == [Kind.LEAKING, Kind.RECOVERED]


# -- silence and replay


def test_silence_is_told_with_the_exit_last_seen(tunnel: Tunnel) -> None:
    tunnel.says_nothing_until(191.0)
    assert tunnel.kinds == [Kind.SILENT]
    assert (tunnel.heard[0].at, tunnel.heard[0].exit) == (191.0, FIRST)
    tunnel.reports((250.0, P), exits=(FIRST,))
    assert [(n.kind, n.was, n.outage) for n in tunnel.heard[1:]] == [(Kind.RECOVERED, State.SILENT, 59.0)]


def test_a_void_silence_ends_when_the_agent_was_heard_again(tunnel: Tunnel) -> None:
    tunnel.says_nothing_until(191.0)
    tunnel.reports((110.0, P), (170.0, P), (230.0, P), exits=(FIRST,))
    ended = tunnel.heard[-1]
    assert (ended.kind, ended.at, ended.began, ended.outage) == (Kind.RECOVERED, 230.0, 191.0, 39.0)


def test_a_replay_in_several_messages_is_one_recovery(tunnel: Tunnel) -> None:
    tunnel.says_nothing_until(191.0)
    tunnel.reports((110.0, P), (150.0, D), (154.0, D), caught_up=False)
    tunnel.reports((180.0, D), (200.0, P), caught_up=False)
    tunnel.reports((204.0, P), (230.0, P), caught_up=False)
    assert tunnel.kinds == [Kind.SILENT]
    tunnel.reports((260.0, P), exits=(FIRST,))
    ended = tunnel.heard[-1]
    assert (ended.kind, ended.was, ended.began, ended.at, ended.outage) == (Kind.RECOVERED, D, 150.0, 200.0, 50.0)


def test_a_replay_that_ends_in_trouble_tells_where_it_stands(tunnel: Tunnel) -> None:
    tunnel.says_nothing_until(191.0)
    tunnel.reports((110.0, P), (150.0, D), (154.0, D), (230.0, D))
    assert [(n.kind, n.at) for n in tunnel.heard] == [(Kind.SILENT, 191.0), (Kind.DOWN, 150.0)]


def test_a_replay_that_is_about_to_end_well_is_not_fresh_trouble(tunnel: Tunnel) -> None:
    tunnel.says_nothing_until(191.0)
    tunnel.reports((150.0, D), (154.0, D), (230.0, P))
    assert tunnel.kinds == [Kind.SILENT]
    tunnel.reports((234.0, P), exits=(FIRST,))
    ended = tunnel.heard[-1]
    assert (ended.kind, ended.was, ended.outage) == (Kind.RECOVERED, D, 80.0)


def test_a_replayed_leak_is_told_at_once_though_it_is_over(tunnel: Tunnel) -> None:
    tunnel.says_nothing_until(191.0)
    tunnel.reports((120.0, L), (130.0, P), (134.0, P), caught_up=False)
    assert [(n.kind, n.at) for n in tunnel.heard] == [(Kind.SILENT, 191.0), (Kind.LEAKING, 120.0)]
    tunnel.reports((230.0, P), exits=(FIRST,))
    ended = tunnel.heard[-1]
    assert (ended.kind, ended.was, ended.began, ended.at) == (Kind.RECOVERED, L, 120.0, 130.0)


def test_an_outage_that_a_replay_shows_and_that_nobody_was_told_of_stays_untold(tunnel: Tunnel) -> None:
    tunnel.reports((150.0, D), (154.0, D), (160.0, P), (164.0, P), caught_up=False)
    tunnel.reports((190.0, P), exits=(FIRST,))
    assert tunnel.heard == []
    assert tunnel.memory.outage is None


def test_a_tunnel_first_seen_in_trouble_recovers_into_connection() -> None:
    tunnel = Tunnel()
    tunnel.reports((100.0, D), (104.0, D), (110.0, P), (114.0, P))
    assert [(n.kind, n.at, n.began) for n in tunnel.heard] == [(Kind.CONNECTED, 110.0, None)]


# -- addresses


def test_another_exit_is_told_with_both(tunnel: Tunnel) -> None:
    tunnel.reports((200.0, P), exits=(SECOND,))
    (changed,) = tunnel.heard
    assert (changed.kind, changed.at, changed.old_exit, changed.exit) == (Kind.ADDRESS_CHANGED, 200.0, FIRST, SECOND)
    tunnel.reports((201.0, P), exits=(SECOND,))
    assert len(tunnel.heard) == 1


def test_an_exit_that_changed_during_an_outage_is_told_with_its_end(tunnel: Tunnel) -> None:
    tunnel.reports((200.0, D), (204.0, D))
    tunnel.reports((210.0, P), (214.0, P), exits=(SECOND,))
    assert [(n.kind, n.old_exit, n.exit) for n in tunnel.heard] == [
        (Kind.DOWN, None, FIRST),
        (Kind.RECOVERED, FIRST, SECOND),
    ]


def test_an_exit_in_the_wrong_country_is_shown_with_the_trouble_that_it_is(tunnel: Tunnel) -> None:
    tunnel.reports((200.0, G), (215.0, G), exits=(SECOND,))
    assert [(n.kind, n.old_exit, n.exit) for n in tunnel.heard] == [(Kind.DEGRADED, FIRST, SECOND)]


def test_an_exit_that_changed_on_the_way_into_trouble_waits_for_it(tunnel: Tunnel) -> None:
    tunnel.reports((200.0, P), (201.0, D), exits=(SECOND,))
    assert tunnel.heard == []
    tunnel.reports((203.0, P), exits=(SECOND,))
    assert [(n.kind, n.at) for n in tunnel.heard] == [(Kind.ADDRESS_CHANGED, 203.0)]


def test_a_replayed_change_of_address_is_told_when_caught_up(tunnel: Tunnel) -> None:
    tunnel.reports((150.0, P), caught_up=False, exits=(SECOND,))
    assert tunnel.heard == []
    tunnel.reports((190.0, P), exits=(SECOND,))
    assert tunnel.kinds == [Kind.ADDRESS_CHANGED]


def test_the_other_familys_address_is_no_change() -> None:
    tunnel = Tunnel()
    tunnel.reports((100.0, P), exits=(FIRST6,))
    tunnel.reports((101.0, P), exits=(FIRST, FIRST6))
    tunnel.reports((102.0, P), exits=(FIRST6,))
    assert tunnel.kinds == [Kind.CONNECTED]
    tunnel.reports((103.0, P), exits=(SECOND, FIRST6))
    assert [(n.kind, n.old_exit, n.exit) for n in tunnel.heard[1:]] == [(Kind.ADDRESS_CHANGED, FIRST, SECOND)]


def test_an_exit_of_ipv6_alone_may_change_too() -> None:
    tunnel = Tunnel()
    tunnel.reports((100.0, P), exits=(FIRST6,))
    tunnel.reports((101.0, P), exits=(SECOND6,))
    assert [(n.kind, n.old_exit, n.exit) for n in tunnel.heard[1:]] == [(Kind.ADDRESS_CHANGED, FIRST6, SECOND6)]


def test_an_address_that_is_seen_first_long_after_the_start_is_no_change() -> None:
    tunnel = Tunnel()
    tunnel.reports((100.0, P))
    tunnel.reports((200.0, P), exits=(FIRST,))
    assert tunnel.kinds == [Kind.CONNECTED]
    tunnel.reports((201.0, P), exits=(SECOND,))
    assert tunnel.kinds == [Kind.CONNECTED, Kind.ADDRESS_CHANGED]


def test_an_agent_that_was_started_before_its_tunnel_is_not_protected_again() -> None:
    new = Tunnel()
    new.reports((100.0, U), (120.0, U), exits=())
    new.reports((124.0, P), exits=(FIRST,))
    new.reports((130.0, P), exits=(FIRST,))
    assert new.kinds == [Kind.UNVERIFIED, Kind.CONNECTED]
    assert (new.heard[1].was, new.heard[1].outage) == (None, None)
    new.reports((200.0, U), (220.0, U), exits=())
    new.reports((224.0, P), (230.0, P), exits=(FIRST,))
    assert new.kinds[2:] == [Kind.UNVERIFIED, Kind.RECOVERED]  # this time it was well before


@pytest.mark.parametrize("state", [L, D, G])
def test_trouble_from_the_start_has_an_end_and_a_length(state: State) -> None:
    """Who waits for `recovered` to end an alarm hears it, though the tunnel was never protected before."""
    new = Tunnel()
    new.reports((100.0, state), (130.0, state))
    new.reports((134.0, P), (140.0, P), exits=(FIRST,))
    assert new.kinds[1:] == [Kind.RECOVERED]
    ended = new.heard[1]
    assert (ended.was, ended.began, ended.outage, ended.first) == (state, 100.0, 34.0, True)
    new.reports((200.0, state), (230.0, state))
    new.reports((234.0, P), (240.0, P), exits=(FIRST,))
    assert (new.kinds[3:], new.heard[3].first) == ([Kind.RECOVERED], False)
