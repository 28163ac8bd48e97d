"""Counters as /proc/net/dev prints them, in a file of the test's."""

from pathlib import Path

import pytest

from tests.conftest import ManualClock
from vpn_sentinel.agent.introspect.device import Stall, StallWatch, counters
from vpn_sentinel.agent.introspect.port import ForwardedPort, port_of

HEAD = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls
"""


def table(**devices: tuple[int, int]) -> bytes:
    rows = (f"{name:>6}: {rx} 1 0 0 0 0 0 0 {tx} 2 0 0 0 0 0 0\n" for name, (rx, tx) in devices.items())
    return (HEAD + "".join(rows)).encode()


def test_counters_of_one_device() -> None:
    text = table(lo=(1, 1), wg01=(8, 9), wg0=(2224, 38333))
    assert counters(text, "wg0") == (2224, 38333)
    assert counters(text, "tun0") is None
    assert counters(b"wg0: 1 2\n", "wg0") is None
    assert counters(b"wg0: x 1 0 0 0 0 0 0 2 0\n", "wg0") is None


def fed(*readings: tuple[float, int, int]) -> list[float]:
    stall = Stall()
    return [now for now, rx, tx in readings if stall.step(now, rx, tx)]


STALLS = {
    "sends on and hears nothing": ([(t, 100, 100 * t) for t in range(6)], [2]),
    "counters that begin again are another device": ([(1, 50, 50), (2, 50, 60), (3, 10, 10), (4, 10, 20)], []),
    "hears something in between": ([(t, 100 + t // 2, 100 * t) for t in range(9)], []),
    "is idle": ([(t, 100, 100) for t in range(9)], []),
    "sends now and then": ([(t, 100, 100 + t // 3) for t in range(12)], []),
    "sends one way for long: not more than twice a minute": ([(t, 100, 100 * t) for t in range(60)], [2, 32]),
}


@pytest.mark.parametrize(("readings", "rang"), STALLS.values(), ids=STALLS.keys())
def test_stalls(readings: list[tuple[float, int, int]], rang: list[float]) -> None:
    assert fed(*readings) == rang


async def test_the_file_is_read_for_the_tunnel_of_the_moment(tmp_path: Path) -> None:
    """Two seconds of sending without an answer ring; the seconds of another device do not count for this one."""
    file, clock = tmp_path / "dev", ManualClock(0.0)
    names = iter(["wg0", "wg0", None, "tun0", "tun0", "tun0", "tun0"])
    sent = iter(range(10, 1000, 10))
    rang: list[float] = []

    class Done(Exception):
        pass

    def name() -> str | None:
        try:
            return next(names)
        except StopIteration as e:
            raise Done from e

    async def second(_: float) -> None:
        clock.now += 1
        n = next(sent)
        file.write_bytes(table(wg0=(5, n), tun0=(5, n)))

    file.write_bytes(table(wg0=(5, 0), tun0=(5, 0)))
    device = StallWatch(name, lambda: rang.append(clock.now), clock, path=str(file), sleep=second)
    with pytest.raises(Done):
        await device.run()
    assert len(rang) == 1
    assert rang[0] >= 5


async def test_without_the_file_it_ends(tmp_path: Path) -> None:
    rang: list[None] = []
    device = StallWatch(lambda: "wg0", lambda: rang.append(None), ManualClock(), path=str(tmp_path / "none"))
    await device.run()
    assert rang == []


# --- the forwarded port -----------------------------------------------------------------------------------------------


def test_a_port_that_was_given_stays() -> None:
    port = ForwardedPort(45678)
    assert (port.read(), port.port, port.is_file) == (False, 45678, False)
    assert ForwardedPort(None).port is None


def test_a_port_in_a_file_follows_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "port"
    port = ForwardedPort(file)
    assert (port.read(), port.read(), port.port) == (False, False, None)
    assert len(caplog.records) == 1
    file.write_text("45678\n45679\n")
    assert (port.read(), port.port, port.read()) == (True, 45678, False)
    file.write_text("none\n")
    assert (port.read(), port.port) == (True, None)


@pytest.mark.parametrize("content", [b"", b"0", b"70000", b"-1", b"x", b"\xff\xfe", b"9" * 99])
def test_what_is_no_port_is_none(content: bytes) -> None:
    assert port_of(content) is None
