"""The system's own resolver: what getaddrinfo(3) says, without waiting for it."""

import asyncio
import json
import os
import socket
import sys
import threading
from ipaddress import ip_address
from pathlib import Path

import pytest

from vpn_sentinel.agent.probes.dns import THIS_HOST, CanaryZone, Nameserver
from vpn_sentinel.agent.probes.system_resolver import (
    SystemResolver,
    UncachedAddresses,
    fresh_names,
    is_agent_name,
    only_local,
)
from vpn_sentinel.domain.observation import Answer, SystemLookup
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.wire import canary


def fails(number: int) -> SystemResolver:
    def lookup(_name: str) -> tuple[IPAddress, ...]:
        raise socket.gaierror(number, "it is so")

    return SystemResolver(lookup, boottime=lambda: 0.0, nsswitch=Path("/nonexistent"))


SAID = {
    "an address": (0, Answer.ANSWERED),
    "nobody answers": (socket.EAI_AGAIN, Answer.UNREACHABLE),
    "a resolver that cannot": (socket.EAI_FAIL, Answer.UNREACHABLE),
    "a system error": (socket.EAI_SYSTEM, Answer.UNREACHABLE),
}


@pytest.mark.parametrize(("number", "answer"), SAID.values(), ids=SAID.keys())
async def test_each_end_of_a_lookup(number: int, answer: Answer) -> None:
    system = fails(number) if number else SystemResolver(lambda _: (), boottime=lambda: 0.0)
    found = await system.ask(None, ())
    assert found is not None
    assert found.answer is answer
    assert ("it is so" in found.error) is (answer is not Answer.ANSWERED)


@pytest.mark.parametrize("number", [socket.EAI_NONAME, socket.EAI_NODATA], ids=["no such name", "no address"])
async def test_a_word_that_there_is_no_such_name_is_an_answer_where_others_are_found(number: int) -> None:
    """Else programs find nothing: a nameserver that denies every name, or answers each with nothing."""

    def lookup(name: str) -> tuple[IPAddress, ...]:
        if name == "a.root-servers.net.":
            return (ip_address("198.41.0.4"),)
        raise socket.gaierror(number, "not known")

    found = await SystemResolver(lookup, boottime=lambda: 0.0, nsswitch=Path("/nonexistent")).ask(ZONE, ())
    assert found == SystemLookup(answer=Answer.ANSWERED)
    assert await fails(number).ask(ZONE, ()) == SystemLookup(
        answer=Answer.UNREACHABLE, error="not even a.root-servers.net is found"
    )


async def test_one_blocked_name_is_no_failure() -> None:
    asked: list[str] = []

    def lookup(name: str) -> tuple[IPAddress, ...]:
        asked.append(name)
        if len(asked) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "refused")
        return ()

    found = await SystemResolver(lookup, boottime=lambda: 0.0).ask(None, ())
    assert found == SystemLookup(answer=Answer.ANSWERED)
    assert len(set(asked[:2])) == 2


async def test_an_answer_that_a_round_did_not_wait_for_says_nothing_of_the_next() -> None:
    """A round that had proved a leak went on without it. The tunnel's nameserver is asked again since."""
    release, answered = threading.Event(), [ip_address("91.10.0.54")]
    zone = CanaryZone("canary.example.org", b"identity", bytes(32))

    def lookup(_name: str) -> tuple[IPAddress, ...]:
        found = tuple(answered)
        release.wait(30)
        return found

    system = SystemResolver(lookup, boottime=lambda: 0.0)
    cut = asyncio.get_running_loop().create_task(system.ask(zone, ()))
    await asyncio.sleep(0.05)
    cut.cancel()
    release.set()
    await asyncio.sleep(0.05)
    answered[:] = [ip_address("185.65.134.53")]
    now = await system.ask(zone, ())
    assert now is not None
    assert now.egress == (ip_address("185.65.134.53"),)


async def test_a_lookup_that_hangs_holds_nothing_up_and_is_not_doubled() -> None:
    release, now = threading.Event(), [0.0]
    started: list[str] = []

    def lookup(name: str) -> tuple[IPAddress, ...]:
        started.append(name)
        release.wait(30)
        return ()

    system = SystemResolver(lookup, patience=0.05, boottime=lambda: now[0])
    assert await system.ask(None, ()) is None
    now[0] = 5.0
    assert await system.ask(None, ()) is None
    now[0] = 13.0
    lost = await system.ask(None, ())
    assert lost is not None
    assert (lost.answer, lost.error) == (Answer.LOST, "no answer for 13 s")
    assert len(started) == 1  # the second name is asked when the first one has ended
    release.set()
    ended = await system.ask(None, ()) or await system.ask(None, ())
    assert ended == SystemLookup(answer=Answer.ANSWERED)


async def test_a_round_that_is_cut_short_leaves_the_lookup_running() -> None:
    release = threading.Event()
    system = SystemResolver(lambda _: (ISP,) * release.wait(30), boottime=lambda: 0.0)
    task = asyncio.create_task(system.ask(None, ()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()
    assert await system.ask(None, ()) == SystemLookup(answer=Answer.ANSWERED)


def test_names_are_fresh_and_absolute_and_in_our_zone() -> None:
    names = (*fresh_names(None), *fresh_names(None))
    assert len(set(names)) == 4
    assert all(n.endswith(".") for n in names)
    zone = CanaryZone("canary.example.org", b"identity", bytes(32))
    assert fresh_names(zone)[0].endswith(".canary.example.org.")


NSSWITCH = {
    "usual": ("passwd: files\nhosts:  files mdns4_minimal [NOTFOUND=return] dns\n", False),
    "systemd-resolved": ("hosts: mymachines resolve [!UNAVAIL=return] files myhostname dns\n", False),
    "files alone": ("hosts: files # dns\n", True),
    "nothing of hosts": ("passwd: files\n", False),
}


@pytest.mark.parametrize(("text", "local"), NSSWITCH.values(), ids=NSSWITCH.keys())
async def test_a_switch_that_names_no_dns_is_no_answer(tmp_path: Path, text: str, *, local: bool) -> None:
    (tmp_path / "nsswitch.conf").write_text(text)
    assert only_local(tmp_path / "nsswitch.conf") is local

    def lookup(name: str) -> tuple[IPAddress, ...]:
        if name == "a.root-servers.net.":
            return (ip_address("198.41.0.4"),)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    found = await SystemResolver(lookup, boottime=lambda: 0.0, nsswitch=tmp_path / "nsswitch.conf").ask(None, ())
    assert found is not None
    assert found.answer is (Answer.UNREACHABLE if local else Answer.ANSWERED)


async def test_the_nameservers_behind_a_stub_are_told(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 192.168.1.1\n")
    stub = Nameserver(ip_address("127.0.0.53"))

    async def upstreams(server: Nameserver) -> list[str]:
        found = await SystemResolver(lambda _: (), boottime=lambda: 0.0, resolved=tmp_path / "resolv.conf").ask(
            None, (server,)
        )
        return [str(a) for a in found.upstreams] if found else []

    assert await upstreams(stub) == ["192.168.1.1"]
    assert await upstreams(THIS_HOST) == []


ISP, CLIENT6, MADE_UP = ip_address("80.58.184.30"), ip_address("2a02:908::53"), ip_address("64:ff9b::503a:b81e")
ZONE = CanaryZone("canary.example.org", b"identity", bytes(32))
EGRESS = {
    "an address": ((ISP,), (ISP,)),
    "one of IPv6 alone": ((CLIENT6,), (CLIENT6,)),
    "one of IPv6 that a translator made of it": ((ip_address("2a02:908:64::503a:b81e"), ISP), (ISP,)),
    "the well-known prefix alone": ((MADE_UP,), ()),
    "an ad blocker's": ((ip_address("0.0.0.0"), ip_address("192.168.1.2")), ()),
    "none, from a server that is older": ((), ()),
}


@pytest.mark.parametrize(("found", "egress"), EGRESS.values(), ids=EGRESS.keys())
async def test_a_name_of_our_own_zone_shows_where_the_resolver_comes_out(
    found: tuple[IPAddress, ...], egress: tuple[IPAddress, ...]
) -> None:
    looked = await SystemResolver(lambda _: found, boottime=lambda: 0.0).ask(ZONE, ())
    assert looked == SystemLookup(answer=Answer.ANSWERED, egress=egress)


async def test_an_address_of_a_name_that_does_not_exist_is_nobodys_egress() -> None:
    def lookup(name: str) -> tuple[IPAddress, ...]:
        if name.startswith("nx-"):
            return (ISP,)
        raise socket.gaierror(socket.EAI_AGAIN, "our server is down")

    assert await SystemResolver(lookup, boottime=lambda: 0.0).ask(ZONE, ()) == SystemLookup(answer=Answer.ANSWERED)


async def test_without_a_zone_an_answer_counts_when_no_cache_can_hold_it_any_more() -> None:
    now = [0.0]

    def lookup(name: str) -> tuple[IPAddress, ...]:
        return (ISP,) if name == "whoami.akamai.net." else ()

    async def egress(at: float, ground: str = "wg0") -> tuple[IPAddress, ...]:
        now[0] = at
        found = await system.ask(None, (), ground)
        assert found is not None
        return found.egress

    system = SystemResolver(lookup, boottime=lambda: now[0])
    assert [await egress(float(t)) for t in range(0, 330, 30)] == [()] * 11
    assert await egress(330.0) == (ISP,)
    assert await egress(360.0, "wg0 by another server") == ()
    assert await egress(900.0, "wg0 by another server") == ()  # nobody looked for long: what was between is not known


def test_names_that_we_make_up_are_known_and_others_are_not() -> None:
    assert all(is_agent_name(n) for n in (*fresh_names(None), *fresh_names(ZONE), fresh_names(ZONE)[0].upper()))
    assert len(fresh_names(ZONE)[0].partition(".")[0]) == canary.LABEL_LENGTH
    assert not any(is_agent_name(n) for n in ("example.org", "r1.l.google.com", "whoami.akamai.net", ""))


def test_an_address_that_is_new_does_not_count() -> None:
    settled = UncachedAddresses()
    for at in range(0, 400, 100):
        settled.of((ISP,), None, float(at))
    assert settled.of((ISP, CLIENT6), None, 400.0) == (ISP,)


LIBC = """
import asyncio, json, socket, subprocess, sys, threading
mounted = [["mount", "--bind", file, f"/etc/{name}"] for file, name in zip(sys.argv[1:], ("resolv.conf", "hosts"))]
for words in ("ip link set lo up".split(), *mounted):
    subprocess.run(words, check=True)
from vpn_sentinel.agent.probes.dns import CanaryZone
from vpn_sentinel.agent.probes.system_resolver import SystemResolver, _getaddrinfo
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.7", 53))
def serve():
    while True:
        asked, at = sock.recvfrom(512)
        end = asked.index(0, 12) + 5
        a, alias = asked[end - 3] == 1, b"blocked" in asked
        name = bytes([4]) + b"page" + bytes([2]) + b"my" + b"\\0"
        records = b""
        if a:
            owner = name if alias else b"\\xc0\\x0c"
            records = (b"\\xc0\\x0c" + bytes([0, 5, 0, 1, 0, 0, 0, 0, 0, len(name)]) + name) if alias else b""
            records += owner + bytes([0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 80, 58, 184, 30])
        count = (2 if alias else 1) if a else 0
        sock.sendto(asked[:2] + b"\\x81\\x80\\0\\1\\0" + bytes([count]) + b"\\0\\0\\0\\0" + asked[12:end] + records, at)
threading.Thread(target=serve, daemon=True).start()
system = SystemResolver(boottime=lambda: 0.0)
looked = asyncio.run(system.ask(CanaryZone("canary.example.org", b"identity", bytes(32)), ()))
print(json.dumps([looked.answer, [str(a) for a in looked.egress], [str(a) for a in _getaddrinfo("blocked.example.")]]))
"""


async def test_the_c_library_itself_shows_it(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.7\n")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    code = LIBC.replace("\\\\", "\\")
    process = await asyncio.create_subprocess_exec(
        "unshare", "--user", "--net", "--mount", "--map-root-user", sys.executable, "-c", code,
        str(tmp_path / "resolv.conf"), str(tmp_path / "hosts"),
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)}, stdout=-1, stderr=-1,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    if b"unshare:" in err:
        pytest.skip(f"no namespaces here: {err.decode().strip()}")
    assert process.returncode == 0, err.decode()
    assert json.loads(out) == ["answered", ["80.58.184.30"], []]
