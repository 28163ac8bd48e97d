import json

import pytest

from vpn_sentinel.agent.uplink.session import Acked, Greeted, Phase, ProtocolError, RefusedByServer, Session
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.wire import codec
from vpn_sentinel.wire.messages import (
    PROTOCOL,
    Ack,
    Echo,
    Exchange,
    FromAgent,
    Hello,
    Refused,
    Report,
    Reports,
    Welcome,
)

HELLO = Hello(protocol=PROTOCOL, client_id="nl-1", spool="a" * 32, version="2", interval=30.0, wall=1.0)
WELCOME = codec.encode(Welcome(ack=0, wall=2.0))
read = codec.decoder(FromAgent)


def report(seq: int) -> Report:
    return Report(seq=seq, age=0.5, observation=Observation(trigger=Trigger.TIMER))


def session(last: int = 9) -> Session:
    return Session(HELLO, last=last, answer_timeout_s=3.0)


def greeted(ack: int = 0) -> Session:
    made = session()
    made.open(100.0)
    made.receive(codec.encode(Welcome(ack=ack, wall=2.0)))
    return made


def test_it_opens_with_a_hello_and_waits_for_the_welcome() -> None:
    made = session()
    assert read(made.open(100.0)) == HELLO
    assert (made.phase, made.deadline) == (Phase.GREETING, 103.0)


def test_the_welcome_says_what_the_server_has() -> None:
    made = session()
    made.open(100.0)
    echo = Echo(port=5000, id="0" * 16, key="0" * 64)
    event = made.receive(codec.encode(Welcome(ack=7, wall=2.0, seen_from="192.0.2.1", echo=echo)))
    assert event == Greeted(ack=7, stale=False, seen_from="192.0.2.1", echo=echo)
    assert (made.phase, made.acked, made.deadline) == (Phase.READY, 7, None)


def test_a_server_that_knows_more_than_was_ever_sent_is_noticed() -> None:
    made = session(last=6)
    made.open(100.0)
    event = made.receive(codec.encode(Welcome(ack=7, wall=2.0)))
    assert isinstance(event, Greeted)
    assert event.stale


def test_reports_wait_for_their_acknowledgement() -> None:
    made = greeted()
    sent = read(made.offer([report(1), report(2)], pending=5, thinned=3, now=200.0))
    assert sent == Reports(items=[report(1), report(2)], pending=5, thinned=3)
    assert (made.phase, made.deadline) == (Phase.WAITING, 203.0)
    assert made.receive(codec.encode(Ack(seq=2))) == Acked(2, 3)
    assert (made.phase, made.acked, made.deadline) == (Phase.READY, 2, None)


def test_a_part_may_be_acknowledged() -> None:
    made = greeted()
    made.offer([report(1), report(2)], pending=0, thinned=0, now=200.0)
    made.receive(codec.encode(Ack(seq=1)))
    assert made.acked == 1


def test_reports_are_not_offered_before_the_welcome_nor_twice() -> None:
    made = session()
    with pytest.raises(RuntimeError, match="new, not ready"):
        made.offer([report(1)], pending=0, thinned=0, now=0.0)
    made = greeted()
    made.offer([report(1)], pending=0, thinned=0, now=0.0)
    with pytest.raises(RuntimeError, match="waiting, not ready"):
        made.offer([report(2)], pending=0, thinned=0, now=0.0)
    with pytest.raises(RuntimeError, match="waiting, not new"):
        made.open(0.0)


def test_an_exchange_carries_both() -> None:
    made = session(last=0)
    said = read(made.exchange([report(4)], pending=1, thinned=2, now=100.0))
    assert said == Exchange(hello=HELLO, reports=Reports(items=[report(4)], pending=1, thinned=2))
    event = made.receive(codec.encode(Welcome(ack=4, wall=2.0)))
    assert isinstance(event, Greeted)
    assert not event.stale


@pytest.mark.parametrize("retry", [True, False])
def test_a_refusal_ends_it_in_any_phase(retry: bool) -> None:
    for made in (session(), greeted()):
        assert made.receive(codec.encode(Refused(reason="no", retry=retry))) == RefusedByServer("no", retry)
        assert (made.phase, made.deadline) == (Phase.OVER, None)


BAD = {
    "not JSON": b"<html>",
    "no message of ours": b'{"type":"hi"}',
    "an ack before anything was sent": codec.encode(Ack(seq=1)),
    "a second welcome": WELCOME,
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_what_comes_out_of_turn_ends_it(data: bytes) -> None:
    made = greeted()
    with pytest.raises(ProtocolError):
        made.receive(data)
    assert made.phase is Phase.OVER


@pytest.mark.parametrize(
    "echo",
    [
        {"port": 5000, "id": "x" * 16, "key": "00" * 32},
        {"port": 5000, "id": "00" * 8, "key": "00"},
        {"port": 65536, "id": "00" * 8, "key": "00" * 32},
    ],
    ids=["no hex", "a short key", "no port"],
)
def test_a_welcome_whose_echo_cannot_be_asked_ends_it(echo: dict[str, object]) -> None:
    made = session()
    made.open(0.0)
    with pytest.raises(ProtocolError):
        made.receive(json.dumps({"type": "welcome", "ack": 0, "wall": 1.0, "echo": echo}))


@pytest.mark.parametrize("seq", [0, 3, 99], ids=["nothing", "what it had", "more than was sent"])
def test_an_acknowledgement_must_move_and_only_within_what_was_sent(seq: int) -> None:
    made = greeted(ack=3)
    made.offer([report(4), report(5)], pending=0, thinned=0, now=0.0)
    with pytest.raises(ProtocolError, match="acknowledges"):
        made.receive(codec.encode(Ack(seq=seq)))


def test_an_answer_that_stays_away_ends_it() -> None:
    made = session()
    assert not made.overdue(1e9)
    made.open(100.0)
    assert not made.overdue(102.9)
    assert made.overdue(103.0)
    assert made.phase is Phase.OVER
