"""What the torrent clients have in common."""

from typing import Final, Protocol

ANSWER_TIMEOUT_S: Final = 5.0
MAX_ANSWER_BYTES: Final = 1024 * 1024


class TorrentClient(Protocol):
    """`pause` stops every torrent and returns the hashes of those that ran; `resume` starts those. Raise
    RemedyError.
    """

    @property
    def name(self) -> str: ...

    async def pause(self) -> tuple[str, ...]: ...

    async def resume(self, hashes: tuple[str, ...]) -> None: ...
