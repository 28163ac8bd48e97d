"""Publishes the names of changed tunnels to listeners: browsers over SSE. Best effort; the database is the truth.

A listener's pending changes are a set of names, so a slow browser costs at most one entry for each tunnel.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager


class Hub:
    """Names of the tunnels whose row changed. Single event loop; `publish` never blocks."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()
        self.closing = asyncio.Event()

    def publish(self, tunnel_names: set[str]) -> None:
        for listener in self._listeners:
            listener.add(tunnel_names)

    @contextmanager
    def listen(self) -> "Iterator[Listener]":
        listener = Listener(self.closing)
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def close(self) -> None:
        """End every stream: a server that shuts down must not wait for browsers."""
        self.closing.set()
        for listener in self._listeners:
            listener.wake.set()

    @property
    def listeners(self) -> int:
        return len(self._listeners)


class Listener:
    """One stream's pending names. They are a set: a tunnel that changed ten times is sent once, as it is now."""

    def __init__(self, closing: asyncio.Event) -> None:
        self._closing = closing
        self._pending: set[str] = set()
        self.wake = asyncio.Event()

    def add(self, names: set[str]) -> None:
        self._pending |= names
        self.wake.set()

    async def changes(self, every: float = 0.25, idle: float = 15.0) -> AsyncIterator[set[str]]:
        """Yield sets of changed names, at most one in `every` seconds; an empty set after `idle` seconds without any.

        Ends when the hub closes.
        """
        while not self._closing.is_set():
            try:
                async with asyncio.timeout(idle):
                    await self.wake.wait()
            except TimeoutError:
                yield set()
                continue
            if self._closing.is_set():
                return
            self.wake.clear()
            changed, self._pending = self._pending, set()
            yield changed
            await asyncio.sleep(every)
