"""The stream of the live pages: each frame is rendered once and sent to every browser.

There is no background task that could die unnoticed: the stream that holds the lock renders the next frame for all. A
browser that cannot keep up gets a full frame instead of the frames that it missed.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Final

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.live.hub import Hub

# Frames kept for slow browsers; at four a second, those of ten seconds.
_MAX_FRAMES_KEPT: Final = 40
# A full frame is reused for further browsers for this time, far less than the kept frames cover.
_SNAPSHOT_CACHE_S: Final = 1.0

# Renders the frame with the tunnels of these names, or with all for None.
Render = Callable[[set[str] | None], Awaitable[bytes]]


class Feed:
    """Frames in order, for any number of streams. Single event loop."""

    def __init__(self, hub: Hub, clock: Clock, render: Render, *, idle: bytes) -> None:
        """`idle` is the frame sent when nothing changed for 15 s. The streams raise whatever `render` raises."""
        self._hub, self._clock, self._render, self._idle = hub, clock, render, idle
        self._listening = ExitStack()
        self._listener = self._listening.enter_context(hub.listen())
        self._changes = self._listener.changes()
        self._unrendered: set[str] = set()
        self._frame_lock = asyncio.Lock()
        self._frames: deque[tuple[int, bytes]] = deque(maxlen=_MAX_FRAMES_KEPT)
        self._number = 0
        self._snapshot_lock = asyncio.Lock()
        self._snapshot: tuple[int, bytes] | None = None
        self._snapshot_until = float("-inf")

    async def open(self) -> AsyncIterator[bytes]:
        """The frames for one browser, a full one first; they end when the hub closes. Raises what `render` raises."""
        number, snapshot = await self._full_frame()
        return self._from(number, snapshot)

    async def _from(self, number: int, snapshot: bytes) -> AsyncIterator[bytes]:
        yield snapshot
        while not self._hub.closing.is_set():
            if self._frames and self._frames[0][0] > number + 1:
                number, snapshot = await self._full_frame()
                yield snapshot
            elif number < self._number:
                missed = [f for n, f in self._frames if n > number]
                number = self._number
                yield b"".join(missed)
            else:
                await self._next(number)

    async def _full_frame(self) -> tuple[int, bytes]:
        """A full frame, and the number of the last frame whose changes it contains for sure.

        One that is a moment old is as good, as the later frames follow. So a hundred browsers that reconnect at once
        cost one query of the database.
        """
        async with self._snapshot_lock:
            if self._snapshot is None or self._clock.boottime() > self._snapshot_until:
                number = self._number
                self._snapshot = (number, await self._render(None))
                self._snapshot_until = self._clock.boottime() + _SNAPSHOT_CACHE_S
            return self._snapshot

    async def _next(self, after: int) -> None:
        """Return once there is a frame later than `after`, or the hub is closing."""
        async with self._frame_lock:
            if self._number > after or self._hub.closing.is_set():
                return  # another stream made it while this one waited for the lock
            if not self._unrendered:
                try:
                    names = await anext(self._changes, None)
                except asyncio.CancelledError:
                    # The browser of the waiting stream disconnected, and its cancellation closed the generator.
                    self._changes = self._listener.changes()
                    raise
                if names is None:
                    return
                self._unrendered = names
            # Kept until they are rendered: a stream that is cancelled here leaves them to the next one.
            frame = await self._render(self._unrendered) if self._unrendered else self._idle
            self._unrendered = set()
            self._number += 1
            self._frames.append((self._number, frame))
