"""When to probe the path MTU: while the tunnel works, after each change and every 10 s.

Without a problem that is one packet of full size in ten seconds, 12 MB a day in each direction. A result is valid until
the next probe.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from vpn_sentinel.agent.net.interfaces import Paths
from vpn_sentinel.agent.probes.mtu import MtuProbe, MtuResult, search
from vpn_sentinel.agent.probes.targets import ServerEcho
from vpn_sentinel.agent.sensors.pulse import PulseSensor
from vpn_sentinel.domain.observation import Observation, Path
from vpn_sentinel.domain.verdict import State, Verdict

MTU_EVERY_S: Final = 10.0
_SETTLED_S: Final = 1.0  # after a change
_MIN_REPLY_TIMEOUT_S: Final = 0.4  # for one packet
_MAX_RTT_S: Final = 0.5  # above it the queue is full, and a late packet is not lost


class PathMtu:
    def __init__(self, pulse: PulseSensor, look_around: Callable[[], Paths], *, changed: Callable[[], None]) -> None:
        """`changed` is called when full-sized packets begin or cease to be lost."""
        self._pulse = pulse
        self._look_around = look_around
        self._changed = changed
        self._well = False
        self._exits: object = None
        self._due = 0.0
        self._wake = asyncio.Event()

    def saw(self, seen: Observation, verdict: Verdict) -> None:
        """A round is over."""
        self._well = verdict.state in (State.PROTECTED, State.DEGRADED)
        exits = (seen.exit(4), seen.exit(6))
        if self._well and exits != self._exits:
            self._exits = exits
            self.reset()
        self._wake.set()

    def reset(self) -> None:
        """Routes changed: earlier results do not apply to the new path."""
        self._due = 0.0
        self._pulse.full_at = asyncio.get_running_loop().time()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            target = self._pulse.target if self._well else None
            if target is not None and loop.time() >= self._due:
                await asyncio.sleep(_SETTLED_S)
                self._due = loop.time() + MTU_EVERY_S
                await self._ask(target)
            try:
                async with asyncio.timeout(max(1.0, self._due - loop.time()) if target else None):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _ask(self, target: ServerEcho) -> None:
        paths = self._look_around()
        link = next((i for i in paths.survey.interfaces or () if i.name == paths.survey.tunnel), None)
        if link is None or not link.mtu or paths.of(target.address, target.port) is not Path.TUNNEL:
            return
        rtt = self._pulse.rtt or 0.0
        if rtt > _MAX_RTT_S:
            return
        try:
            with MtuProbe(target, self._numbered) as sizer:
                size, patience = sizer.largest(link.mtu), max(_MIN_REPLY_TIMEOUT_S, 3 * rtt)
                found = await search(lambda s: sizer.ask(s, patience), size, target.address.version)
        except OSError:
            return  # unreachable now: a round reports that
        if self._pulse.target == target and self._due > 0.0:
            self._keep(found)

    def _numbered(self, target: ServerEcho, size: int) -> tuple[int, int, bytes]:
        number, datagram = self._pulse.datagram(target, size)
        return self._pulse.numbers.run, number, datagram

    def _keep(self, found: MtuResult) -> None:
        before = self._pulse.vanished
        if found.mtu is None:
            return  # nothing passed: the earlier result stays
        self._pulse.mtu, self._pulse.vanished = found.mtu, found.vanished
        if found.vanished is None:
            self._pulse.full_at = asyncio.get_running_loop().time()
        if (before is None) != (found.vanished is None):
            self._changed()
