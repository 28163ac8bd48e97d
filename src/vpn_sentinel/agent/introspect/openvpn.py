"""The state of OpenVPN, from its management interface (OpenVPN's doc/management-notes.txt): clear text, line by line.

It serves one client at a time and does not answer the next one, so a missing greeting means "busy".
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.net.endpoints import TCP, UDP, Endpoint
from vpn_sentinel.agent.net.urls import address_in
from vpn_sentinel.domain.observation import Claim
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.backoff import backoff
from vpn_sentinel.runtime.secret import Secret

log = logging.getLogger(__name__)

GREETING_TIMEOUT_S: Final = 3.0  # and for the first state
_MAX_LINE_BYTES: Final = 4096
_MAX_LINES: Final = 64  # before the first state
_PROMPT: Final = b"ENTER PASSWORD:"


class RefusedError(Exception):
    """The management interface refuses this client; the text is the reason."""


@dataclass(frozen=True, slots=True)
class OpenVpnState:
    """`name` is OpenVPN's. The server's address and port are known once it is connected."""

    name: str
    address: IPAddress | None = None
    port: int | None = None


def read_state(text: str) -> OpenVpnState | None:
    """`time,name,description,local,remote,port,…`, as an answer or after `>STATE:`; None for any other line."""
    words = text.split(",")
    if len(words) < 2 or not words[0].isascii() or not words[0].isdigit():
        return None
    name = words[1]
    if not 0 < len(name) <= 32 or not name.isascii() or not name.replace("_", "").isalnum():
        return None
    address = address_in(words[4]) if len(words) > 4 else None
    port = int(words[5]) if len(words) > 5 and words[5].isascii() and words[5].isdigit() else 0
    return OpenVpnState(name, address, port if 0 < port < 2**16 else None)


class OpenVpn:
    """Keeps one connection, and calls `changed` when the state changes."""

    def __init__(
        self,
        where: str,
        password: Secret,
        changed: Callable[[], None],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        patience: float = GREETING_TIMEOUT_S,
    ) -> None:
        """`where` is the path of a UNIX socket, or ADDRESS:PORT."""
        self._where = where
        self._password = password
        self._changed = changed
        self._sleep = sleep
        self._patience = patience
        self._state: OpenVpnState | None = None
        self._error: str | None = None
        self._endpoints: tuple[Endpoint, ...] = ()

    def claim(self) -> Claim | None:
        """None before the first answer."""
        if self._state is not None:
            return Claim(source="openvpn", status=self._state.name, endpoint=self._endpoint())
        if self._error is not None:
            return Claim(source="openvpn", status=f"error: {self._error}", endpoint=self._endpoint())
        return None

    def endpoints(self) -> tuple[Endpoint, ...]:
        """The last server endpoint, for both protocols: the state does not show which one it is."""
        return self._endpoints

    def _endpoint(self) -> str | None:
        return str(self._endpoints[0]).partition("/")[0] if self._endpoints else None

    async def run(self) -> None:
        """Connect and listen; never returns."""
        waits = backoff(1.0, 60.0)
        while True:
            try:
                await self._session()
            except (OSError, EOFError, ValueError, RefusedError, TimeoutError) as e:
                if self._state is not None:
                    waits = backoff(1.0, 60.0)
                self._lost(_why(e))
            await self._sleep(next(waits))

    def _lost(self, why: str) -> None:
        """Log the reason when it changes. The loss of a known state is a change too."""
        if why != self._error:
            log.warning("OpenVPN's management interface does not serve", extra={"where": self._where, "why": why})
        had, self._state, self._error = self._state, None, why
        if had is not None:
            self._changed()

    async def _session(self) -> None:
        async with asyncio.timeout(self._patience):
            reader, writer = await self._connect()
        try:
            await self._log_in(reader, writer)
            async with asyncio.timeout(self._patience):
                # Both in one write, so that no change is missed between them. Later states come only on a change.
                writer.write(b"state\nstate on\n")
                await self._first_state(reader)
            if self._error is not None:
                log.info("OpenVPN's management interface serves again", extra={"where": self._where})
                self._error = None
            while True:
                line = await _line(reader)
                if line.startswith(">STATE:"):
                    self._take(read_state(line.removeprefix(">STATE:")))
        finally:
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._where.startswith("/"):
            return await asyncio.open_unix_connection(self._where, limit=_MAX_LINE_BYTES)
        host, _, port = self._where.rpartition(":")
        return await asyncio.open_connection(host.strip("[]"), int(port), limit=_MAX_LINE_BYTES)

    async def _log_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Wait for the greeting; give the password after a prompt, which comes without a line break."""
        try:
            async with asyncio.timeout(self._patience):
                first = await reader.readexactly(1)
        except TimeoutError:
            raise RefusedError("it is busy with another client") from None
        async with asyncio.timeout(self._patience):
            if first != _PROMPT[:1]:
                await _line(reader)
                return
            await reader.readuntil(_PROMPT[-1:])
            if not self._password:
                raise RefusedError("it asks for a password: set VPN_SENTINEL_OPENVPN_MANAGEMENT_PASSWORD")
            writer.write(self._password.reveal().encode() + b"\n")
            if not (await _line(reader)).startswith("SUCCESS:"):
                raise RefusedError("it refuses the password")

    async def _first_state(self, reader: asyncio.StreamReader) -> None:
        """The answer to `state`: its last line before END."""
        found = None
        for _ in range(_MAX_LINES):
            line = await _line(reader)
            if line == "END":
                break
            found = read_state(line) or found
        if found is None:
            raise RefusedError("it shows no state")
        self._take(found)

    def _take(self, state: OpenVpnState | None) -> None:
        if state is None:
            return
        old, self._state = self._state, state
        if state.address is not None and state.port is not None:
            self._endpoints = tuple(Endpoint(state.address, state.port, protocol) for protocol in (UDP, TCP))
        # The very first is no change: the first round reads it anyway.
        if (old.name if old else None) != state.name and (old is not None or self._error is not None):
            self._changed()


async def _line(reader: asyncio.StreamReader) -> str:
    line = await reader.readline()  # ValueError when it is too long
    if not line.endswith(b"\n"):
        raise EOFError
    return line.decode("utf-8", "replace").rstrip("\r\n")


def _why(error: BaseException) -> str:
    match error:
        case RefusedError():
            return str(error)
        case TimeoutError():
            return "no answer in time"
        case EOFError():
            return "it closed the connection"
        case OSError() if error.strerror:
            return error.strerror
        case _:
            return "its answer makes no sense"
