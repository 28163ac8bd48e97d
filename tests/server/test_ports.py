"""Forwarded ports are tried from outside: who, when, and what counts as closed."""

import asyncio
import errno
import random
from ipaddress import ip_address

import pytest

from tests.conftest import ManualClock
from vpn_sentinel.domain.observation import Answer
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.server.tracking.inputs import PortCheckResult
from vpn_sentinel.server.watch.ports import CHECK_INTERVAL_S, PortChecker, try_connect

HERE = ip_address("127.0.0.1")
EXIT = (ip_address("146.70.1.2"), 41000)


class Door:
    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[IPAddress, int]] = []
        self.told: list[PortCheckResult] = []

    async def try_connect(self, address: IPAddress, port: int) -> Answer:
        self.asked.append((address, port))
        return self.answers.pop(0)

    async def tried(self, port: PortCheckResult) -> None:
        self.told.append(port)


async def test_an_open_a_shut_and_a_refusing_port() -> None:
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await try_connect(HERE, port) is Answer.ANSWERED
    server.close()
    await server.wait_closed()
    assert await try_connect(HERE, port) is Answer.UNREACHABLE


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([Answer.ANSWERED], Answer.ANSWERED),
        ([Answer.UNREACHABLE], Answer.UNREACHABLE),
        ([Answer.LOST, Answer.LOST, Answer.ANSWERED], Answer.ANSWERED),
        ([Answer.LOST, Answer.LOST, Answer.LOST], Answer.LOST),
        ([Answer.UNKNOWN], None),
    ],
)
async def test_only_the_third_silence_counts_as_closed(
    answers: list[Answer], told: Answer | None, clock: ManualClock
) -> None:
    door = Door(*answers)
    ports = PortChecker({"nl": EXIT}, door.tried, clock, try_connect=door.try_connect, pause=0.0)
    ((name, where),) = ports.due()
    await ports._try(name, where)
    assert [t.check.answer for t in door.told] == ([] if told is None else [told])
    assert door.answers == []


async def test_each_is_tried_now_and_then_a_changed_one_soon_and_a_gone_one_never(clock: ManualClock) -> None:
    forwarded = {"nl": EXIT}
    door = Door(*[Answer.ANSWERED] * 9)
    ports = PortChecker(forwarded, door.tried, clock, try_connect=door.try_connect, pause=0.0, rng=random.Random(1))

    async def tried() -> list[object]:
        due = ports.due()
        for name, where in due:
            await ports._try(name, where)
        return list(due)

    assert await tried() == [("nl", EXIT)]
    assert await tried() == []
    forwarded["nl"] = (EXIT[0], 42000)
    clock.now += 10
    assert await tried() == []  # not as fast as an agent likes
    clock.now += 25
    assert await tried() == [("nl", (EXIT[0], 42000))]
    clock.now += CHECK_INTERVAL_S * 1.1
    assert await tried() == [("nl", (EXIT[0], 42000))]
    forwarded.clear()
    clock.now += CHECK_INTERVAL_S * 2
    assert ports.due() == []


async def test_a_host_out_of_descriptors_knows_nothing_of_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> object:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("socket.socket", refuse)
    assert await try_connect(*EXIT) is Answer.UNKNOWN


async def test_what_cannot_be_kept_stops_no_other_try(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    async def try_connect(_address: object, _port: int) -> Answer:
        return Answer.ANSWERED

    async def tried(_port: PortCheckResult) -> None:
        raise ValueError("a row of a newer version")

    ports = PortChecker({"nl": EXIT}, tried, clock, try_connect=try_connect, pause=0.0)
    ((name, where),) = ports.due()
    await ports._try(name, where)
    assert "cannot be stored" in caplog.text


async def test_one_whose_answer_is_still_awaited_is_not_asked_again(clock: ManualClock) -> None:
    door, answer = Door(), asyncio.Event()

    async def try_connect(_address: object, _port: int) -> Answer:
        await answer.wait()
        return Answer.ANSWERED

    ports = PortChecker({"nl": EXIT}, door.tried, clock, try_connect=try_connect, pause=0.0)
    async with asyncio.TaskGroup() as group:
        ((name, where),) = ports.due()
        group.create_task(ports._try(name, where))
        await asyncio.sleep(0)
        clock.now += CHECK_INTERVAL_S * 1.1
        assert ports.due() == []
        answer.set()
    assert ports.due() == [("nl", EXIT)]
