"""Torrent clients that are asked to pause: what both have in common."""

from typing import Final, Protocol

ANSWER_TIMEOUT_S: Final = 5.0  # seconds for one answer
MAX_ANSWER_BYTES: Final = 1024 * 1024  # bytes of one


class TorrentClient(Protocol):
    """`pause` stops every torrent and returns those that were running; `resume` starts those. Raise RemedyError."""

    @property
    def name(self) -> str: ...

    async def pause(self) -> tuple[str, ...]: ...

    async def resume(self, hashes: tuple[str, ...]) -> None: ...
