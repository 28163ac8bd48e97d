"""A program that goes over to TCP behind a kill switch is known by its first data; any other is told within a second.

The packets are made here and sent by a raw socket, so that both ends of a connection fit into one namespace.
"""

import pytest

from tests.agent.leakwatch.test_watch import ran

RAW = """
from tests.agent.leakwatch.bytes import ip as packed, tcp
from vpn_sentinel.domain.observation import Answer, Canary, Path, Probe
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
RESET = b"\\x38" + b"s" * 8 + b"\\0\\0\\0\\1" + (1_800_000_000).to_bytes(4) + b"s" * 37
HELLO = b"\\x16\\x03\\x01" + b"h" * 200
OPENVPN = len(RESET).to_bytes(2) + RESET
def go(to, flags, data=b"", port=443, own=4001):
    raw.sendto(packed("192.168.7.2", to, 6, tcp(own, port, flags, data))[1], (to, 0))
def handshake(to, own=4001):
    go(to, 0x02, own=own); go(to, 0x10, own=own)
watch = make()
def refuse(answer):
    canary = Canary(probe=Probe.PHYSICAL, target="cloudflare", family=4, answer=answer, path=Path.OUTSIDE)
    watch.escapes(Paths(kernel, around()), (canary,))
loop = asyncio.get_running_loop()
async def come(n):
    await until(lambda: len(came) >= n)
    await turns()
"""

CASES = {
    "OpenVPN": ('handshake("203.0.113.5"); go("203.0.113.5", 0x18, OPENVPN)', [], True),
    "TLS": (
        'handshake("203.0.113.5"); go("203.0.113.5", 0x18, HELLO)',
        ["203.0.113.5"],
        False,
    ),
    "nothing follows": ('handshake("203.0.113.5"); go("203.0.113.5", 0x10)', [], False),
}


@pytest.mark.parametrize(("packets", "at_once", "learned"), CASES.values(), ids=CASES.keys())
async def test_behind_a_kill_switch_the_first_data_of_a_connection_tells(
    packets: str, at_once: list[str], learned: bool
) -> None:
    seen = await ran(
        RAW
        + f"""
refuse(Answer.BLOCKED)
{packets}
await come(3)
at_once = [str(e.destination) for e in acted]
await asyncio.sleep(0.9)
say(at_once=at_once, later=[str(e.destination) for e in acted], endpoints=[str(e) for e in watch.endpoints])
"""
    )
    assert seen["at_once"] == at_once
    assert seen["later"] == ([] if learned else ["203.0.113.5"])
    assert ("203.0.113.5:443/tcp" in str(seen["endpoints"])) is learned


async def test_without_a_kill_switch_a_connection_is_told_by_its_first_packet() -> None:
    seen = await ran(
        RAW
        + """
refuse(Answer.ANSWERED)
go("203.0.113.5", 0x02)
await come(1)
first = len(acted)
refuse(Answer.BLOCKED)
for own in range(20):
    go("203.0.113.9", 0x02, own=5000 + own)
await come(21)
await until(lambda: len(acted) > 1)
say(first=first, many=[str(e.destination) for e in acted])
"""
    )
    assert seen["first"] == 1
    assert seen["many"] == ["203.0.113.5", "203.0.113.9"]  # no VPN program begins so many at once
