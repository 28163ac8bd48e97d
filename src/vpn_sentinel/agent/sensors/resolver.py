"""Nameserver changes between two rounds: another resolv.conf, or another egress of a nameserver.

The file is checked every half second, which costs one stat(2). With a zone of our own, each nameserver gets one canary
every six seconds; without one, no query is sent, since it would burden servers of others.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Final

from vpn_sentinel.agent.probes import dns
from vpn_sentinel.domain import resolvers
from vpn_sentinel.domain.observation import Observation, ResolverSighting
from vpn_sentinel.domain.policy import IPAddress, Policy
from vpn_sentinel.domain.verdict import Code, Verdict
from vpn_sentinel.runtime.clock import tick

FILE_EVERY_S: Final = 0.5
CANARY_EVERY_S: Final = 6.0  # for each nameserver
_MAX_KNOWN_PAIRS: Final = 256


@dataclass(slots=True)
class UnexpectedEgresses:
    """Detects canaries with an egress that no round has judged; no I/O."""

    _seen: Observation | None = None
    _policy: Policy = field(default_factory=Policy)
    _judged: set[tuple[IPAddress, IPAddress]] = field(default_factory=set)
    _fine: dict[tuple[IPAddress, IPAddress], None] = field(default_factory=dict)

    def saw(self, seen: Observation, verdict: Verdict, policy: Policy) -> None:
        """A round is over. The egresses that it saw are no news; those that it did not judge a leak stay no news."""
        if not seen.resolvers:
            return
        self._seen, self._policy = seen, policy
        self._judged = {(s.nameserver, s.egress) for s in seen.resolvers if s.egress is not None}
        if Code.DNS_LEAK not in {f.code for f in verdict.findings}:
            for pair in self._judged:
                self._fine[pair] = None
            while len(self._fine) > _MAX_KNOWN_PAIRS:
                del self._fine[next(iter(self._fine))]
        else:
            self._fine = {pair: None for pair in self._fine if pair not in self._judged}

    def is_news(self, sighting: ResolverSighting) -> bool:
        """Whether it is a reason for a round."""
        if self._seen is None or sighting.egress is None:
            return False
        pair = (sighting.nameserver, sighting.egress)
        if pair in self._judged or pair in self._fine:
            return False
        leaks = resolvers.leak(sighting, self._seen, self._policy) is not None
        return leaks or not resolvers.is_expected(sighting.egress, self._seen, self._policy)


class ResolverWatch:
    """Calls `changed` when resolv.conf did, and `unexpected_egress` for an egress that no round saw."""

    def __init__(
        self,
        *,
        canary: Callable[[], dns.CanaryZone | None],
        changed: Callable[[], None],
        unexpected_egress: Callable[[], None],
        file: FilePath = dns.RESOLV_CONF,
        nameservers: Callable[[], Sequence[dns.Nameserver]] = dns.system_nameservers,
        file_every: float = FILE_EVERY_S,
        canary_every: float = CANARY_EVERY_S,
    ) -> None:
        self._canary, self._changed, self._unexpected_egress = canary, changed, unexpected_egress
        self._file, self._nameservers = file, nameservers
        self._file_every, self._canary_every = file_every, canary_every
        self._egresses = UnexpectedEgresses()
        self._known = mark(file)

    def round_begins(self) -> None:
        """A round begins and will read the file, so its current state is no news."""
        self._known = mark(self._file)

    def saw(self, seen: Observation, verdict: Verdict, policy: Policy) -> None:
        """A round is over."""
        self._egresses.saw(seen, verdict, policy)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_file())
            group.create_task(self._ask())

    async def _watch_file(self) -> None:
        while True:
            await tick(self._file_every)
            now = mark(self._file)
            if now != self._known:
                self._known = now
                self._changed()

    async def _ask(self) -> None:
        while True:
            zone, servers = self._canary(), self._nameservers()
            if zone is None or not servers:
                await asyncio.sleep(self._canary_every)
                continue
            for server in servers:  # one after the other, so that each is asked every `canary_every` seconds
                await asyncio.sleep(self._canary_every / len(servers))
                seen = await dns.sighting(server, zone)
                if seen is not None and self._egresses.is_news(seen):
                    self._unexpected_egress()


def mark(file: FilePath) -> tuple[int, ...] | None:
    """A value that differs when the file was written or replaced; None when there is no file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
