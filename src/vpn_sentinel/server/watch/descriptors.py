"""Watches for a lack of file descriptors: without them the server accepts no connection, and must report that."""

import asyncio
import errno
import os
from typing import Final

from prometheus_client import CollectorRegistry, Counter

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.shortage import AcceptFailures, out_of_descriptors

_INTERVAL_S: Final = 1.0


class Descriptors:
    """Checks once a second. Without descriptors, uvloop closes each new connection and reports no error (libuv's
    `uv__emfile_trick`), so the connections themselves cannot be counted.
    """

    def __init__(self, clock: Clock, registry: CollectorRegistry) -> None:
        self._untaken = AcceptFailures(clock.boottime)
        self._short = Counter(
            "vpn_sentinel_descriptors_short_seconds",
            "Seconds in which no descriptor was left: new connections were closed as they came.",
            registry=registry,
        )

    async def run(self) -> None:
        while True:
            if out_of_descriptors():
                self._short.inc(_INTERVAL_S)
                self._untaken.note(os.strerror(errno.EMFILE))
            await asyncio.sleep(_INTERVAL_S)
