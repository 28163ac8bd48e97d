"""The pulse port: who is answered, what is noted, and what a stranger can do to it: nothing."""

import asyncio
import random
import secrets
from ipaddress import ip_address

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from tests.conftest import until
from vpn_sentinel.server.ingest.pulse import KnownTunnels, PulseMetrics, PulseProtocol, PulseQueue
from vpn_sentinel.server.ingest.pulse_registry import PulseChange, PulseRegistry, ReplayWindow
from vpn_sentinel.server.store.store import StoreUnavailable
from vpn_sentinel.server.tracking.inputs import PulseObservation
from vpn_sentinel.wire import echo, pulse

SECRET = b"s" * 32
EXIT, HOME = ("185.65.134.10", 40000), ("91.10.10.20", 40000)
RUN = 77


class Wire:
    def __init__(self) -> None:
        self.sent: list[tuple[bytes, tuple[str, int]]] = []

    def sendto(self, data: bytes, addr: tuple[str, int]) -> None:
        self.sent.append((data, addr))


class Agent:
    def __init__(self, name: str = "nl", run: int = RUN) -> None:
        self.ident = echo.ident_for(SECRET, name)
        self.key = echo.key_for(SECRET, self.ident)
        self.run, self.number, self.heard = run, 0, 0

    def pulse(self, *, silent: int = 0, size: int | None = None) -> bytes:
        self.number += 1
        return pulse.request(
            self.ident, self.key, run=self.run, number=self.number, heard=self.heard, silent=silent, size=size
        )


class Port:
    """The protocol with a wire and a clock that a test moves."""

    def __init__(self, *names: str) -> None:
        self.changes: list[PulseChange] = []
        self.unknown = 0
        self.registry = PulseRegistry(SECRET, self.changes.append)
        self.registry.add_known(dict.fromkeys(names, 0.0))
        self.now = 100.0
        self.protocol = PulseProtocol(self.registry, lambda: self.now, on_unknown=self._miss)
        self.wire = Wire()
        self.protocol.connection_made(self.wire)  # type: ignore[arg-type]

    def _miss(self) -> None:
        self.unknown += 1

    def gets(self, data: bytes, addr: tuple[str, int] = EXIT) -> bytes | None:
        """What it answers."""
        before = len(self.wire.sent)
        self.protocol.datagram_received(data, addr)
        return self.wire.sent[-1][0] if len(self.wire.sent) > before else None


def test_a_pulse_is_answered_once() -> None:
    port, agent = Port("nl"), Agent()
    asked = agent.pulse()
    answer = port.gets(asked)
    assert answer is not None
    assert pulse.read_reply(answer, agent.ident, RUN, agent.key) == (1, ip_address(EXIT[0]))
    assert port.gets(asked, HOME) is None
    assert port.changes == [PulseChange("nl", ip_address(EXIT[0]), unheard=False)]
    assert port.protocol.counts == {"answered": 1, "malformed": 0, "unknown": 0, "forged": 0, "replayed": 1}


@pytest.mark.parametrize("size", [64, 576, 1400, 1472])
def test_a_sized_pulse_has_a_reply_of_its_size(size: int) -> None:
    port, agent = Port("nl"), Agent()
    asked = agent.pulse(size=size)
    answer = port.gets(asked, ("2a01::5", 9))
    assert answer is not None
    assert len(answer) == len(asked) == size
    assert pulse.read_reply(answer, agent.ident, RUN, agent.key) == (1, ip_address("2a01::5"))
    assert port.gets(asked, ("2a01::5", 9)) is None


def test_questions_of_old_agents_are_answered_and_noted_nowhere() -> None:
    port, agent = Port("nl"), Agent()
    question = echo.request(agent.ident, b"12345678", agent.key)
    for _ in range(2):
        answer = port.gets(question, HOME)
        assert answer is not None
        assert echo.read_reply(answer, agent.ident, b"12345678", agent.key) == ip_address(HOME[0])
    assert port.changes == []


def test_who_was_never_greeted_is_not_answered_and_asked_about() -> None:
    port, agent = Port("nl"), Agent("de")
    assert port.gets(agent.pulse()) is None
    assert port.unknown == 1
    port.registry.greet("de", "key")
    assert port.gets(agent.pulse()) is not None


def test_a_revoked_agent_is_not_answered_until_it_is_greeted_again() -> None:
    port, agent = Port("nl"), Agent()
    port.registry.forget("nl", "key", at=1000.0)
    assert port.gets(agent.pulse()) is None
    port.registry.add_known({"nl": 1005.0})  # its row is in the database still, with what came by the key before
    assert port.gets(agent.pulse()) is None
    port.registry.greet("nl", "key")
    assert port.gets(agent.pulse()) is not None


def test_a_revoked_key_does_not_silence_the_agent_that_came_by_another() -> None:
    port, agent = Port(), Agent()
    port.registry.greet("nl", "old")
    port.registry.greet("nl", "new")
    port.registry.forget("nl", "old", at=1000.0)  # by the session of the old agent, which runs still
    assert port.gets(agent.pulse()) is not None
    port.registry.forget("nl", "new", at=1000.0)
    assert port.gets(agent.pulse()) is None


def test_a_tunnel_that_reports_to_another_replica_by_another_key_is_answered_here_too() -> None:
    port, agent = Port("nl"), Agent()
    port.registry.forget("nl", "old", at=1000.0)
    port.registry.add_known({"nl": 1011.0})
    assert port.gets(agent.pulse()) is not None


def test_strangers_make_no_records_and_few_checks() -> None:
    port = Port("nl")
    for _ in range(1000):
        assert port.gets(b"VSE1\x01" + secrets.token_bytes(59)) is None
    stranger = Agent("de")
    for _ in range(200):
        port.gets(stranger.pulse())
    assert len(port.registry) == 1
    assert port.unknown == 0  # this second's checks went to garbage
    port.now += 1.1
    port.gets(stranger.pulse())
    assert port.unknown == 1


def test_an_address_is_told_when_it_changes() -> None:
    port, agent = Port("nl"), Agent()
    for address in (EXIT, EXIT, HOME, HOME, EXIT, ("::ffff:185.65.134.10", 1), ("2a01::5", 1), EXIT):
        port.gets(agent.pulse(), address)
    assert [str(s.address) for s in port.changes] == [EXIT[0], HOME[0], EXIT[0], "2a01::5"]


def test_an_agent_that_hears_no_more_is_told_and_its_recovery_too() -> None:
    port, agent = Port("nl"), Agent()
    for _ in range(5):
        port.gets(agent.pulse())
        agent.heard = agent.number
        port.now += 2
    began = port.now
    port.changes.clear()
    while not port.changes:
        port.gets(agent.pulse(silent=int(1000 * (port.now - began + 2))))
        port.now += 0.3
    assert 2.4 < port.now - began < 3.6
    assert port.changes == [PulseChange("nl", ip_address(EXIT[0]), unheard=True)]
    for _ in range(20):  # told again every few seconds
        port.gets(agent.pulse(silent=60_000))
        port.now += 0.5
    assert 3 <= len(port.changes) <= 5
    agent.heard = agent.number
    port.gets(agent.pulse())
    assert not port.changes[-1].unheard


@pytest.mark.parametrize("held", [3.0, 20.0])
def test_pulses_that_were_held_back_say_nothing_of_answers_that_they_could_not_know(held: float) -> None:
    """A lossy line that stood still, or this server, for a while: all that waited comes at once."""
    port, agent = Port("nl"), Agent()
    for _ in range(5):
        port.gets(agent.pulse())
        agent.heard = agent.number
        port.now += 1
    port.changes.clear()
    port.gets(agent.pulse())
    for _ in range(2):  # the answers to this one and to the next are lost
        port.now += 0.5
        port.gets(agent.pulse(silent=1000))
    waited = [agent.pulse(silent=1000 + 100 * n) for n in range(int(10 * held))]
    port.now += held
    for data in waited:
        port.gets(data)
    for _ in range(3):  # sent before the first answer was there
        port.now += 0.1
        port.gets(agent.pulse(silent=int(1000 * held) + 1000))
    agent.heard = agent.number
    port.gets(agent.pulse())
    assert not any(s.unheard for s in port.changes)


def test_an_agent_that_never_heard_a_reply_is_none_that_hears_no_more() -> None:
    port, agent = Port("nl"), Agent()
    for _ in range(30):
        port.gets(agent.pulse(silent=pulse.NEVER))
        port.now += 1
    assert not any(s.unheard for s in port.changes)


def test_when_most_agents_hear_nothing_it_is_this_servers_own_way_back() -> None:
    names = [f"t{i}" for i in range(10)]
    port, agents = Port(*names), [Agent(n) for n in names]
    for beat in range(60):
        for agent in agents:
            port.gets(agent.pulse(silent=10_000))
            agent.heard = agent.number if beat < 5 else agent.heard
        port.now += 0.5
    assert not any(s.unheard for s in port.changes)


def test_a_new_run_is_answered_at_once_and_counts_when_the_old_one_is_over() -> None:
    port, old, new = Port("nl"), Agent(), Agent(run=78)
    kept = [old.pulse() for _ in range(10)]
    for pulse_ in kept:
        assert port.gets(pulse_) is not None
    assert port.gets(new.pulse(), HOME) is not None
    assert len(port.changes) == 1
    port.now += 7
    assert port.gets(new.pulse(), HOME) is not None
    assert [str(s.address) for s in port.changes] == [EXIT[0], HOME[0]]
    port.now += 7
    assert [port.gets(k) for k in kept] == [None] * 10  # each number once


def test_who_kept_pulses_of_an_old_run_cannot_speak_for_the_one_that_lives() -> None:
    port, agent = Port("nl"), Agent()
    kept = [old.pulse(silent=60_000) for old in (Agent(run=run) for run in range(20)) for _ in range(5)]
    for number in range(100):
        assert port.gets(agent.pulse()) is not None  # and is not shut out by them
        port.gets(kept[number], HOME)
        port.now += 2
    assert [str(s.address) for s in port.changes] == [EXIT[0]]


def test_a_run_that_an_old_one_displaced_in_a_silence_comes_back() -> None:
    port, agent, old = Port("nl"), Agent(), Agent(run=78)
    heard = agent.pulse()
    port.gets(heard)
    port.now += 60
    port.gets(old.pulse(), HOME)
    port.now += 7
    assert port.gets(heard) is None
    assert port.gets(agent.pulse()) is not None
    assert [str(s.address) for s in port.changes] == [EXIT[0], HOME[0], EXIT[0]]


def test_it_is_known_since_when_pulses_come_without_a_gap() -> None:
    port, agent = Port("nl"), Agent()
    assert port.registry.gapless_span("nl") is None
    for _ in range(3):
        port.gets(agent.pulse())
        port.now += 2
    assert port.registry.gapless_span("nl") == (100.0, 104.0)
    port.now += 3
    port.gets(agent.pulse())
    assert port.registry.gapless_span("nl") == (109.0, 109.0)
    port.gets(agent.pulse(), ("192.168.7.2", 40000))
    assert port.registry.gapless_span("nl") is None  # over a LAN: that says nothing of the internet


@given(st.lists(st.integers(1, 400), max_size=300))
def test_a_window_takes_each_number_once_and_none_that_is_old(numbers: list[int]) -> None:
    window, taken, top = ReplayWindow(), set[int](), 0
    for number in numbers:
        expected = number not in taken and number > top - 128
        assert window.take(number) is expected
        if expected:
            taken.add(number)
        top = max(top, number)


def test_a_window_takes_a_leap_and_no_zero() -> None:
    window = ReplayWindow()
    assert not window.take(0)
    assert window.take(2**32 - 1)
    assert not window.take(1)
    assert window.take(2**32 - 128)
    assert not window.take(2**32 - 129)


def test_any_changed_bit_is_silence() -> None:
    port, agent = Port("nl"), Agent()
    genuine = agent.pulse()
    for bit in range(8 * len(genuine)):
        changed = bytearray(genuine)
        changed[bit // 8] ^= 1 << bit % 8
        assert port.gets(bytes(changed)) is None
    assert port.gets(genuine) is not None


def test_garbage_of_every_size_is_silence() -> None:
    port, agent, dice = Port("nl"), Agent(), random.Random(5)
    genuine = agent.pulse(size=1472)
    for size in range(1600):
        assert port.gets(dice.randbytes(size)) is None
        if size != 1472:
            assert port.gets((genuine * 2)[:size]) is None


def test_what_became_of_pulses_is_told_to_prometheus() -> None:
    port, agent, registry = Port("nl"), Agent(), CollectorRegistry()
    PulseMetrics(registry, lambda: port.protocol.counts)
    port.gets(agent.pulse())
    port.gets(b"x")
    text = generate_latest(registry).decode()
    assert 'vpn_sentinel_pulses_total{result="answered"} 1.0' in text
    assert 'vpn_sentinel_pulses_total{result="malformed"} 1.0' in text


async def test_names_are_read_at_the_start_and_when_one_is_missing() -> None:
    names = {"nl": 0.0}
    port = Port()

    async def read() -> dict[str, float]:
        return names

    known = KnownTunnels(port.registry, read, min_interval_s=0.01)
    task = asyncio.create_task(known.run())
    await until(lambda: len(port.registry) == 1)
    names["de"] = 0.0
    known.refresh()
    await until(lambda: len(port.registry) == 2)
    task.cancel()


async def test_news_reach_the_tracker_and_wait_for_the_database() -> None:
    got: list[PulseObservation] = []
    down = [True]

    async def sighted(observation: PulseObservation) -> None:
        if down[0]:
            down[0] = False
            raise StoreUnavailable("gone", "the database is away")
        got.append(observation)

    pulse_queue = PulseQueue(lambda: 5.0)
    task = asyncio.create_task(pulse_queue.run(sighted))
    pulse_queue.note(PulseChange("nl", ip_address(EXIT[0]), unheard=False))
    await until(lambda: got)
    assert got == [PulseObservation(tunnel="nl", address=ip_address(EXIT[0]), unheard=False, at=5.0)]
    task.cancel()


def test_a_real_socket_under_uvloop() -> None:
    async def talk() -> bytes:
        loop = asyncio.get_running_loop()
        pulse_registry, agent = PulseRegistry(SECRET), Agent()
        pulse_registry.greet("nl", "key")
        transport, _ = await loop.create_datagram_endpoint(
            lambda: PulseProtocol(pulse_registry, loop.time), local_addr=("127.0.0.1", 0)
        )
        answered: asyncio.Future[bytes] = loop.create_future()

        class Client(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, _addr: tuple[str, int]) -> None:
                answered.set_result(data)

        client, _ = await loop.create_datagram_endpoint(
            Client, remote_addr=("127.0.0.1", transport.get_extra_info("sockname")[1])
        )
        client.sendto(b"garbage")
        client.sendto(agent.pulse(size=1000))
        try:
            async with asyncio.timeout(5):
                return await answered
        finally:
            client.close()
            transport.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert len(runner.run(talk())) == 1000
