"""The system's own resolver: what getaddrinfo(3) says, without waiting for it."""

import asyncio
import socket
import threading
from ipaddress import ip_address
from pathlib import Path

import pytest

from vpn_sentinel.agent.probes.dns import THIS_HOST, CanaryZone, Nameserver
from vpn_sentinel.agent.probes.system_resolver import SystemResolver, fresh_names, only_local
from vpn_sentinel.domain.observation import Answer, SystemLookup


def fails(number: int) -> SystemResolver:
    def lookup(_name: str) -> None:
        raise socket.gaierror(number, "it is so")

    return SystemResolver(lookup, boottime=lambda: 0.0, nsswitch=Path("/nonexistent"))


SAID = {
    "an address": (0, Answer.ANSWERED),
    "no such name": (socket.EAI_NONAME, Answer.ANSWERED),
    "a name without an address": (socket.EAI_NODATA, Answer.ANSWERED),
    "nobody answers": (socket.EAI_AGAIN, Answer.UNREACHABLE),
    "a resolver that cannot": (socket.EAI_FAIL, Answer.UNREACHABLE),
    "a system error": (socket.EAI_SYSTEM, Answer.UNREACHABLE),
}


@pytest.mark.parametrize(("number", "answer"), SAID.values(), ids=SAID.keys())
async def test_each_end_of_a_lookup(number: int, answer: Answer) -> None:
    system = fails(number) if number else SystemResolver(lambda _: None, boottime=lambda: 0.0)
    found = await system.ask(None, ())
    assert found is not None
    assert found.answer is answer
    assert ("it is so" in found.error) is (answer is not Answer.ANSWERED)


async def test_one_blocked_name_is_no_failure() -> None:
    asked: list[str] = []

    def lookup(name: str) -> None:
        asked.append(name)
        if len(asked) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "refused")

    found = await SystemResolver(lookup, boottime=lambda: 0.0).ask(None, ())
    assert found == SystemLookup(answer=Answer.ANSWERED)
    assert len(set(asked)) == 2


async def test_a_lookup_that_hangs_holds_nothing_up_and_is_not_doubled() -> None:
    release, now = threading.Event(), [0.0]
    started: list[str] = []

    def lookup(name: str) -> None:
        started.append(name)
        release.wait(30)

    system = SystemResolver(lookup, patience=0.05, boottime=lambda: now[0])
    assert await system.ask(None, ()) is None
    now[0] = 5.0
    assert await system.ask(None, ()) is None
    now[0] = 13.0
    lost = await system.ask(None, ())
    assert lost is not None
    assert (lost.answer, lost.error) == (Answer.LOST, "no answer for 13 s")
    assert len(started) == 1
    release.set()
    ended = await system.ask(None, ()) or await system.ask(None, ())
    assert ended == SystemLookup(answer=Answer.ANSWERED)


async def test_a_round_that_is_cut_short_leaves_the_lookup_running() -> None:
    release = threading.Event()
    system = SystemResolver(lambda _: release.wait(30), boottime=lambda: 0.0)
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

    def lookup(_name: str) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    found = await SystemResolver(lookup, boottime=lambda: 0.0, nsswitch=tmp_path / "nsswitch.conf").ask(None, ())
    assert found is not None
    assert found.answer is (Answer.UNREACHABLE if local else Answer.ANSWERED)


async def test_the_nameservers_behind_a_stub_are_told(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 192.168.1.1\n")
    stub = Nameserver(ip_address("127.0.0.53"))

    async def upstreams(server: Nameserver) -> list[str]:
        found = await SystemResolver(lambda _: None, boottime=lambda: 0.0, resolved=tmp_path / "resolv.conf").ask(
            None, (server,)
        )
        return [str(a) for a in found.upstreams] if found else []

    assert await upstreams(stub) == ["192.168.1.1"]
    assert await upstreams(THIS_HOST) == []
