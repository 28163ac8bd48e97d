"""WireGuard's state: endpoints, mark, last handshake and counters of one interface, and never a key.

A userspace device (wireguard-go, boringtun) answers on a UNIX socket; see "Cross-platform Userspace Implementation" on
wireguard.com. Its answer to `get=1` contains the private key too: a line with a key is dropped as it is read. For a
device in the kernel `wg show` is run once for each value, so that no key is printed (as `dump` would). Both need
CAP_NET_ADMIN, or root.
"""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vpn_sentinel.agent.net.endpoints import Endpoint, parse_endpoint
from vpn_sentinel.domain.observation import Claim

FOLDERS: Final = ("/run/wireguard", "/var/run/wireguard")
LOOK_TIMEOUT_S: Final = 0.5
_MAX_LINE_BYTES: Final = 4096
_MAX_ANSWER_BYTES: Final = 256 * 1024  # enough for some thousand peers
_KEY_PREFIXES: Final = (b"private_key=", b"preshared_key=")
_SHOW_ARGUMENTS: Final = ("endpoints", "latest-handshakes", "transfer", "fwmark")


class DeviceError(Exception):
    """The device was found but could not be read; the text is the reason, without any part of its answer."""


@dataclass(frozen=True, slots=True)
class Peer:
    """`handshake` is the time of the last one, in seconds since 1970 by this host's clock; 0: never."""

    endpoint: Endpoint | None = None
    handshake: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Device:
    """`fwmark` is the mark of the tunnel's own packets, 0 for none."""

    fwmark: int = 0
    peers: tuple[Peer, ...] = ()

    def claim(self, wall: float) -> Claim:
        """The peer with the newest handshake. Its age is unknown when its time is in the future (a wrong clock)."""
        peer = max(self.peers, key=lambda p: p.handshake, default=Peer())
        age = wall - peer.handshake if peer.handshake else None
        return Claim(
            source="wireguard",
            endpoint=None if peer.endpoint is None else str(peer.endpoint),
            handshake_age=round(age, 1) if age is not None and age >= 0 else None,
        )


async def read_device(interface: str, *, kernel: bool, folders: Sequence[str] = FOLDERS) -> Device | None:
    """Read once, within half a second; None when there is no source for `interface` here.

    `kernel`: the device is one of WireGuard in the kernel. Raises DeviceError, and PermissionError without the
    privilege.
    """
    try:
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            for folder in folders:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    return await _userspace(f"{folder}/{interface}.sock")
            program = shutil.which("wg") if kernel else None
            return None if program is None else await _kernel(program, interface)
    except TimeoutError as e:
        raise DeviceError("no answer in time") from e
    except PermissionError:
        raise
    except (OSError, EOFError) as e:
        raise DeviceError((e.strerror if isinstance(e, OSError) else None) or "the answer was cut off") from e
    except ValueError as e:
        raise DeviceError("the answer makes no sense") from e


async def _userspace(path: str) -> Device:
    reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_LINE_BYTES)
    try:
        writer.write(b"get=1\n\n")
        return await read_answer(_lines(reader))
    finally:
        writer.transport.abort()


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of the answer up to the empty one that ends it, without those with a key."""
    taken = 0
    while line := await reader.readline():
        taken += len(line)
        if taken > _MAX_ANSWER_BYTES:
            raise DeviceError("the answer is too large")
        if line == b"\n":
            return
        if not line.startswith(_KEY_PREFIXES):
            yield line.rstrip(b"\n")
    raise EOFError


async def read_answer(lines: AsyncIterator[bytes]) -> Device:
    """Parse the answer to `get=1`. Raises ValueError, or DeviceError with the device's error number."""
    device, peers = Device(), list[Peer]()
    async for line in lines:
        name, _, value = line.decode("ascii").partition("=")
        match name:
            case "fwmark":
                device = replace(device, fwmark=_number(value, 32))
            case "public_key":
                peers.append(Peer())
            case "endpoint" if peers:
                peers[-1] = replace(peers[-1], endpoint=_endpoint(value))
            case "last_handshake_time_sec" if peers:
                peers[-1] = replace(peers[-1], handshake=_number(value))
            case "rx_bytes" if peers:
                peers[-1] = replace(peers[-1], rx_bytes=_number(value))
            case "tx_bytes" if peers:
                peers[-1] = replace(peers[-1], tx_bytes=_number(value))
            case "errno" if value != "0":
                raise DeviceError(f"it answers with error {int(value[:12])}")
    return replace(device, peers=tuple(peers))


async def _kernel(program: str, interface: str) -> Device:
    return read_shown({what: await _show(program, interface, what) for what in _SHOW_ARGUMENTS})


async def _show(program: str, interface: str, what: str) -> str:
    process = await asyncio.create_subprocess_exec(
        program, "show", interface, what,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None  # noqa: S101 - PIPE was requested
    try:
        output = bytearray()
        while chunk := await process.stdout.read(65536):
            output += chunk
            if len(output) > _MAX_ANSWER_BYTES:
                raise DeviceError("the answer is too large")
        if await process.wait() != 0:
            raise DeviceError("wg cannot show it")
        return output.decode("ascii")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def read_shown(output: dict[str, str]) -> Device:
    """Parse the output of `wg show INTERFACE …` for each of four arguments. Raises ValueError."""
    peers: dict[str, Peer] = {}
    for words in _rows(output["endpoints"], 2):
        peers[words[0]] = Peer(endpoint=_endpoint(words[1]))
    for words in _rows(output["latest-handshakes"], 2):
        peers[words[0]] = replace(peers.get(words[0], Peer()), handshake=_number(words[1]))
    for words in _rows(output["transfer"], 3):
        peers[words[0]] = replace(peers.get(words[0], Peer()), rx_bytes=_number(words[1]), tx_bytes=_number(words[2]))
    mark = output["fwmark"].strip()
    return Device(fwmark=0 if mark in ("", "off") else _number(mark, 32), peers=tuple(peers.values()))


def _number(text: str, bits: int = 63) -> int:
    """Raises ValueError for a number that is larger than the kernel's type."""
    found = int(text, 0) if text.startswith("0x") else int(text)
    if not 0 <= found < 2**bits:
        raise ValueError(text[:20])
    return found


def _rows(text: str, columns: int) -> list[list[str]]:
    rows = [line.split() for line in text.splitlines()]
    if any(len(row) != columns for row in rows):
        msg = f"a row of other than {columns} columns"
        raise ValueError(msg)
    return rows


def _endpoint(text: str) -> Endpoint | None:
    """None for `(none)`, and for a link-local address with a zone, which is not on the internet."""
    try:
        return parse_endpoint(text)
    except ValueError:
        return None
