"""The management interface is a server of the test's that speaks as OpenVPN's doc/management-notes.txt says."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.agent.doubles import tcp, unix
from tests.conftest import until
from vpn_sentinel.agent.introspect.openvpn import OpenVpn, read_state
from vpn_sentinel.runtime.secret import Secret

GREETING = b">INFO:OpenVPN Management Interface Version 5 -- type 'help' for more info\r\n"
CONNECTED = "1800000000,CONNECTED,SUCCESS,10.65.2.10,185.65.134.2,1194,,,fd64:1:2::a"
RECONNECTING = "1800000001,RECONNECTING,ping-restart,,,,,"


class Management:
    """OpenVPN's side of it."""

    def __init__(self, state: str = CONNECTED, password: str = "") -> None:
        self.state, self.password = state, password
        self.commands: list[str] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.password:
            writer.write(b"ENTER PASSWORD:")
            if (await reader.readline()).decode().strip() != self.password:
                writer.write(b"ERROR: bad password\r\nENTER PASSWORD:")
                await reader.read()
                return
            writer.write(b"SUCCESS: password is correct\r\n")
        writer.write(GREETING)
        self.writers.append(writer)
        while line := await reader.readline():
            self.commands.append(line.decode().strip())
            if self.commands[-1] == "state":
                writer.write(f"{self.state}\r\nEND\r\n".encode())
            elif self.commands[-1] == "state on":
                writer.write(b"SUCCESS: real-time state notification set to ON\r\n")

    def tell(self, state: str) -> None:
        self.state = state
        self.writers[-1].write(f">STATE:{state}\r\n".encode())


@asynccontextmanager
async def listening(where: str, password: str = "", patience: float = 1.0) -> AsyncIterator[tuple[OpenVpn, list[None]]]:
    rang: list[None] = []

    async def soon(_: float) -> None:
        await asyncio.sleep(0.01)

    openvpn = OpenVpn(where, Secret(password), lambda: rang.append(None), sleep=soon, patience=patience)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(openvpn.run())
        try:
            yield openvpn, rang
        finally:
            task.cancel()


def status(openvpn: OpenVpn) -> str:
    claim = openvpn.claim()
    return claim.status if claim else ""


async def test_the_state_is_asked_and_then_listened_to(tmp_path: Path) -> None:
    management, path = Management(), tmp_path / "m.sock"
    async with unix(path, management.talk), listening(str(path)) as (openvpn, rang):
        await until(lambda: status(openvpn) == "CONNECTED")
        assert management.commands == ["state", "state on"]
        assert (openvpn.claim().endpoint, rang) == ("185.65.134.2:1194", [])  # type: ignore[union-attr]
        assert [str(e) for e in openvpn.endpoints()] == ["185.65.134.2:1194/udp", "185.65.134.2:1194/tcp"]
        management.tell(RECONNECTING)
        await until(lambda: rang)
        assert status(openvpn) == "RECONNECTING"
        assert len(openvpn.endpoints()) == 2  # still known
        management.tell(RECONNECTING)
        management.tell(CONNECTED)
        await until(lambda: status(openvpn) == "CONNECTED")
        assert len(rang) == 2


async def test_it_connects_again_when_openvpn_starts_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    management, path = Management(), tmp_path / "m.sock"
    async with contextlib.AsyncExitStack() as first:
        await first.enter_async_context(unix(path, management.talk))
        async with listening(str(path)) as (openvpn, rang):
            await until(lambda: status(openvpn) == "CONNECTED")
            management.writers[-1].close()
            await until(lambda: len(management.writers) == 2)
            await until(lambda: status(openvpn) == "CONNECTED")
            assert len(rang) == 2  # gone, and back
    told = [r.message for r in caplog.records]
    assert told == [
        "OpenVPN's management interface does not serve",
        "OpenVPN's management interface serves again",
    ]


@pytest.mark.parametrize(
    ("password", "says"),
    [("s3cret-word", "CONNECTED"), ("wrong", "error: it refuses the password"), ("", "error: it asks for a password")],
)
async def test_passwords(password: str, says: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    management = Management(password="s3cret-word")
    async with tcp(management.talk) as port, listening(f"127.0.0.1:{port}", password) as (openvpn, _):
        await until(lambda: status(openvpn))
        assert status(openvpn).startswith(says)
    assert "s3cret-word" not in caplog.text
    assert "wrong" not in caplog.text


async def test_one_that_is_busy_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It lets a second client wait without a word."""
    tries = 0

    async def mute(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        await reader.read()

    path = tmp_path / "m.sock"
    async with unix(path, mute), listening(str(path), patience=0.02) as (openvpn, rang):
        await until(lambda: tries > 3)
        assert status(openvpn) == "error: it is busy with another client"
        assert rang == []
    assert len([r for r in caplog.records if "does not serve" in r.message]) == 1


BROKEN = {
    "a line without end": GREETING + b"x" * 100_000,
    "no state": GREETING + b"1,\xff,\r\nEND\r\n",
    "notices without end": GREETING + b">LOG:1,I,hello\r\n" * 1000,
    "a farewell": GREETING,
    "nothing": b"",
}


@pytest.mark.parametrize("said", BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_one_is_an_error_and_tried_again(tmp_path: Path, said: bytes) -> None:
    tries = 0

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        writer.write(said)
        await writer.drain()

    path = tmp_path / "m.sock"
    async with unix(path, talk), listening(str(path), patience=0.2) as (openvpn, _):
        await until(lambda: tries > 2)
        assert status(openvpn).startswith("error: ")


async def test_one_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    async with listening(str(tmp_path / "none.sock")) as (openvpn, _):
        await until(lambda: status(openvpn) == "error: No such file or directory")


@pytest.mark.parametrize("text", ["", "x,CONNECTED", "1,", "1,<b>", "1," + "A" * 99, "hello"])
def test_what_is_no_state_is_not_taken_for_one(text: str) -> None:
    assert read_state(text) is None


def test_states_of_older_releases_have_fewer_words() -> None:
    old = read_state("1800000000,CONNECTED,SUCCESS,10.0.0.2,185.65.134.2")
    assert old is not None
    assert (str(old.address), old.port) == ("185.65.134.2", None)
    strange = read_state("1800000000,CONNECTED,SUCCESS,10.0.0.2,nowhere,99999")
    assert strange is not None
    assert (strange.address, strange.port) == (None, None)
