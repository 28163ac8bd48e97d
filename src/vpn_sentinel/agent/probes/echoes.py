"""The server's UDP echo, from its last Welcome: the target of canaries and pulses."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel.agent.net.resolver import HostResolver, NotFoundError
from vpn_sentinel.agent.probes.targets import ServerEcho, Target
from vpn_sentinel.domain.policy import IPAddress, is_public
from vpn_sentinel.wire.messages import Echo

_LOOKUP_EVERY_S: Final = 60.0


@dataclass(slots=True)
class Echoes:
    """The server's UDP echo by its last Welcome: one target for each IP version of its public addresses."""

    names: HostResolver
    hosts: Sequence[str]
    targets: tuple[Target, ...] = ()
    _echo: Echo | None = None
    _greeted: asyncio.Event = field(default_factory=asyncio.Event)

    def greet(self, echo: Echo | None) -> None:
        """A Welcome was received."""
        self._echo = echo
        self._learn()
        self._greeted.set()

    async def run(self) -> None:
        """Look up the server's other names: where reports go over the LAN, nothing else looks up its public name."""
        while True:
            await self._greeted.wait()
            self._greeted.clear()
            for host in self.hosts:
                if not self.names.known(host):
                    with contextlib.suppress(NotFoundError):  # tried again after the next Welcome, or in a minute
                        await self.names.addresses(host)
            self._learn()
            if not all(self.names.known(host) for host in self.hosts):
                self._greeted.set()
            await asyncio.sleep(_LOOKUP_EVERY_S)

    def addresses(self) -> Iterator[IPAddress]:
        """All known addresses of the server, with or without an echo."""
        return (a for host in self.hosts for a in self.names.known(host))

    def _learn(self) -> None:
        if self._echo is None:
            self.targets = ()
            return
        port, ident, key = self._echo.port, bytes.fromhex(self._echo.id), bytes.fromhex(self._echo.key)
        # A server on the LAN or on this machine does not see the exit address.
        public = {a.version: a for a in reversed([*self.addresses()]) if is_public(a)}
        self.targets = tuple(ServerEcho(public[v], port, ident, key) for v in sorted(public))
