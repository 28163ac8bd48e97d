"""The stream behind the live pages: each frame is made once and sent to every browser.

There is no task that could die unseen: the streams take turns at making the next frame, and whoever holds the turn
makes it for all. A browser that cannot keep up is sent the whole again instead of what it missed.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Final

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.live.hub import Hub

# Frames kept for browsers that are behind; at four in a second, ten seconds of storm.
_MAX_FRAMES_KEPT: Final = 40
# How long the whole is given to further browsers, in seconds; far less than the frames kept reach back.
_WHOLE_FRESH_S: Final = 1.0

# From names to the frame that shows them as they are now; from None to the frame that shows everything.
Render = Callable[[set[str] | None], Awaitable[bytes]]


class Feed:
    """Frames in order, for any number of streams. Single event loop."""

    def __init__(self, hub: Hub, clock: Clock, render: Render, *, idle: bytes) -> None:
        """`idle` is the frame sent when nothing changed for 15 s. `render` raises what it likes; streams pass it on."""
        self._hub, self._clock, self._render, self._idle = hub, clock, render, idle
        self._listening = ExitStack()
        self._listener = self._listening.enter_context(hub.listen())
        self._changes = self._listener.changes()
        self._owed: set[str] = set()
        self._turn = asyncio.Lock()
        self._frames: deque[tuple[int, bytes]] = deque(maxlen=_MAX_FRAMES_KEPT)
        self._number = 0
        self._whole_turn = asyncio.Lock()
        self._whole: tuple[int, bytes] | None = None
        self._whole_until = float("-inf")

    async def open(self) -> AsyncIterator[bytes]:
        """The frames for one browser, the whole first; they end when the hub closes. Raises what `render` raises."""
        number, whole = await self._everything()
        return self._from(number, whole)

    async def _from(self, number: int, whole: bytes) -> AsyncIterator[bytes]:
        yield whole
        while not self._hub.closing.is_set():
            if self._frames and self._frames[0][0] > number + 1:
                number, whole = await self._everything()
                yield whole
            elif number < self._number:
                missed = [f for n, f in self._frames if n > number]
                number = self._number
                yield b"".join(missed)
            else:
                await self._next(number)

    async def _everything(self) -> tuple[int, bytes]:
        """The whole, and the number of the last frame that it surely contains.

        One that is a moment old is as good: the frames since follow. So a hundred browsers that come back at once cost
        one reading of the database.
        """
        async with self._whole_turn:
            if self._whole is None or self._clock.boottime() > self._whole_until:
                number = self._number
                self._whole = (number, await self._render(None))
                self._whole_until = self._clock.boottime() + _WHOLE_FRESH_S
            return self._whole

    async def _next(self, after: int) -> None:
        """Return once there is a frame later than `after`, or the hub is closing."""
        async with self._turn:
            if self._number > after or self._hub.closing.is_set():
                return  # somebody else made it while this stream waited for its turn
            if not self._owed:
                try:
                    names = await anext(self._changes, None)
                except asyncio.CancelledError:
                    # The browser whose turn it was went away, and took the generator with it.
                    self._changes = self._listener.changes()
                    raise
                if names is None:
                    return
                self._owed = names
            # Owed until they are rendered: a turn that breaks off here leaves them to the next.
            frame = await self._render(self._owed) if self._owed else self._idle
            self._owed = set()
            self._number += 1
            self._frames.append((self._number, frame))
