"""The server's own echo, as it was told: who is asked by the canaries and the pulses."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel.agent.net.resolver import HostResolver, NotFoundError
from vpn_sentinel.agent.probes.targets import ServerEcho, Target
from vpn_sentinel.domain.policy import IPAddress, is_public
from vpn_sentinel.wire.messages import Echo

_SEEK_APART: Final = 60.0  # seconds


@dataclass(slots=True)
class Echoes:
    """The server's UDP echo, as its last Welcome told: one target for each family of its public addresses."""

    names: HostResolver
    hosts: Sequence[str]
    targets: tuple[Target, ...] = ()
    _told: Echo | None = None
    _greeted: asyncio.Event = field(default_factory=asyncio.Event)

    def greet(self, echo: Echo | None) -> None:
        """A Welcome came."""
        self._told = echo
        self._learn()
        self._greeted.set()

    async def run(self) -> None:
        """Look up the server's other names: where reports go over the LAN, nobody else asks for the public one's."""
        while True:
            await self._greeted.wait()
            self._greeted.clear()
            for host in self.hosts:
                if not self.names.known(host):
                    with contextlib.suppress(NotFoundError):  # the next greeting, or the next minute, tries again
                        await self.names.addresses(host)
            self._learn()
            if not all(self.names.known(host) for host in self.hosts):
                self._greeted.set()
            await asyncio.sleep(_SEEK_APART)

    def addresses(self) -> Iterator[IPAddress]:
        """All that are known of the server, whatever its echo is."""
        return (a for host in self.hosts for a in self.names.known(host))

    def _learn(self) -> None:
        if self._told is None:
            self.targets = ()
            return
        port, ident, key = self._told.port, bytes.fromhex(self._told.id), bytes.fromhex(self._told.key)
        # A server on the LAN or on this machine does not see where we leave for the internet.
        public = {a.version: a for a in reversed([*self.addresses()]) if is_public(a)}
        self.targets = tuple(ServerEcho(public[v], port, ident, key) for v in sorted(public))
