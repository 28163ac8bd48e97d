"""What a client's WebSocket frames may cost, counted from the bytes as they come (RFC 6455, section 5.2)."""

import struct
from typing import Final

# Frames that may come at once, and that a second adds: a message of the largest size, cut small by a proxy, and pings.
FRAMES, FRAMES_A_SECOND = 512.0, 50.0
_POLICY_VIOLATION: Final = 1008  # RFC 6455, section 7.4.1
_REASON: Final = b"too many frames"
TOO_MANY_FRAMES: Final = struct.pack("!BBH", 0x88, 2 + len(_REASON), _POLICY_VIOLATION) + _REASON  # a server's Close

_LENGTH_BYTES: Final = {126: 2, 127: 8}  # behind the first two
_MASK_BYTES: Final = 4


class FrameMeter:
    """A frame costs as much as it is parsed, whether anything is in it or not, and a ping is answered."""

    def __init__(self, now: float) -> None:
        self._left, self._counted_at = FRAMES, now
        self._begun = b""  # of a frame's head
        self._payload = 0  # bytes of the last frame that are still to come

    def grants(self, data: bytes, now: float) -> bool:
        """Whether the frames that begin in `data`, which has come at `now` (seconds), are not too many."""
        self._left = min(FRAMES, self._left + (now - self._counted_at) * FRAMES_A_SECOND)
        self._counted_at = now
        if self._payload >= len(data):
            self._payload -= len(data)
            return True
        data = self._begun + data
        at, end = self._payload, len(data)
        while (after := _after_head(data, at)) and self._left >= 0:
            self._left -= 1
            at = after
        self._begun, self._payload = data[at:], max(0, at - end)
        return self._left >= 0


def _after_head(data: bytes, at: int) -> int:
    """Where the frame that begins at `at` ends; 0 where its length has not come."""
    if at + 2 > len(data):
        return 0
    size = data[at + 1] & 0x7F
    start = at + 2 + _LENGTH_BYTES.get(size, 0)
    if start > len(data):
        return 0
    if size in _LENGTH_BYTES:
        size = int.from_bytes(data[at + 2 : start], "big")
    return start + (_MASK_BYTES if data[at + 1] & 0x80 else 0) + size
