import socket
import struct
from ipaddress import ip_address

from tests.agent.doubles import udp
from vpn_sentinel.agent.probes.datagram import DatagramTarget, ask, offender
from vpn_sentinel.domain.observation import Answer

HERE = ip_address("127.0.0.1")


def echo(data: bytes) -> bytes | None:
    return data if data == b"hello" else None


async def test_an_answer_comes_with_its_round_trip() -> None:
    async with udp(lambda data: data) as (port, _):
        found = await ask(DatagramTarget(address=HERE, port=port), b"hello", echo)
    assert (found.answer, found.value) == (Answer.ANSWERED, b"hello")
    assert found.rtt_ms is not None
    assert 0 <= found.rtt_ms < 1000


async def test_answers_to_something_else_are_ignored() -> None:
    async with udp(lambda data: [b"forged", data]) as (port, _):
        assert (await ask(DatagramTarget(address=HERE, port=port), b"hello", echo)).value == b"hello"


async def test_a_question_that_gets_lost_is_asked_once_more() -> None:
    seen: list[bytes] = []

    def second(data: bytes) -> bytes | None:
        seen.append(data)
        return data if len(seen) == 2 else None

    async with udp(second) as (port, _):
        found = await ask(DatagramTarget(address=HERE, port=port), b"hello", echo, limit=2.0, resend=0.02)
    assert found.answer is Answer.ANSWERED


async def test_silence_is_lost() -> None:
    async with udp(lambda _: None) as (port, served):
        found = await ask(DatagramTarget(address=HERE, port=port), b"hello", echo, limit=0.1, resend=0.03)
        assert len(served.got) == 2
    assert found.answer is Answer.LOST


async def test_a_closed_port_is_unreachable(free_port: int) -> None:
    found = await ask(DatagramTarget(address=HERE, port=free_port), b"hello", echo, limit=5)
    assert found.answer is Answer.UNREACHABLE


async def test_the_same_over_ipv6() -> None:
    here = ip_address("::1")
    async with udp(lambda data: data, "::1") as (port, _):
        assert (await ask(DatagramTarget(address=here, port=port), b"hello", echo)).answer is Answer.ANSWERED


async def test_a_device_that_is_gone_has_no_way_out() -> None:
    found = await ask(DatagramTarget(address=HERE, port=9, device="nonesuch0"), b"hello", echo)
    assert found.answer in (Answer.UNREACHABLE, Answer.UNKNOWN)  # without the capability the kernel does not even say


async def test_hops_are_limited_for_both_families() -> None:
    async with udp(lambda data: data) as (port, _):
        assert (await ask(DatagramTarget(address=HERE, port=port, hops=1), b"hello", echo)).answer is Answer.ANSWERED
    async with udp(lambda data: data, "::1") as (port, _):
        found = await ask(DatagramTarget(address=ip_address("::1"), port=port, hops=1), b"hello", echo)
        assert found.answer is Answer.ANSWERED


def test_who_reported_the_error_is_read_from_its_socket_address() -> None:
    assert offender(struct.pack("=HH4s8x", socket.AF_INET, 0, bytes([192, 0, 2, 1]))) == ip_address("192.0.2.1")
    six = struct.pack("=HHI16sI", socket.AF_INET6, 0, 0, ip_address("2001:db8::1").packed, 0)
    assert offender(six) == ip_address("2001:db8::1")
    assert offender(b"") is None
    assert offender(struct.pack("=H6x", 0)) is None
    assert offender(six[:12]) is None
