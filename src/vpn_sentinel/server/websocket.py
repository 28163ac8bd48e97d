"""Limits the rate of a client's WebSocket frames, counted in the received bytes (RFC 6455, section 5.2)."""

import struct
from typing import Final

# Enough for a message of the largest size that a proxy cuts into small frames, and for pings.
FRAME_BURST, FRAMES_PER_SECOND = 512.0, 50.0
_POLICY_VIOLATION: Final = 1008  # RFC 6455, section 7.4.1
_REASON: Final = b"too many frames"
TOO_MANY_FRAMES: Final = struct.pack("!BBH", 0x88, 2 + len(_REASON), _POLICY_VIOLATION) + _REASON  # a server's Close

_LENGTH_BYTES: Final = {126: 2, 127: 8}  # after the first two bytes
_MASK_BYTES: Final = 4


class FrameMeter:
    """A token bucket for frames: parsing one costs the same with or without content, and pings are answered."""

    def __init__(self, now: float) -> None:
        self._allowance, self._counted_at = FRAME_BURST, now
        self._partial_head = b""  # the received part of a frame's head
        self._payload = 0  # bytes of the last frame that have not come yet

    def allows(self, data: bytes, now: float) -> bool:
        """Whether the frames that begin in `data`, received at `now` (seconds), are within the limit."""
        self._allowance = min(FRAME_BURST, self._allowance + (now - self._counted_at) * FRAMES_PER_SECOND)
        self._counted_at = now
        if self._payload >= len(data):
            self._payload -= len(data)
            return True
        data = self._partial_head + data
        at, end = self._payload, len(data)
        while (after := _frame_end(data, at)) and self._allowance >= 0:
            self._allowance -= 1
            at = after
        self._partial_head, self._payload = data[at:], max(0, at - end)
        return self._allowance >= 0


def _frame_end(data: bytes, at: int) -> int:
    """The end of the frame that begins at `at`; 0 while its length is not complete."""
    if at + 2 > len(data):
        return 0
    size = data[at + 1] & 0x7F
    start = at + 2 + _LENGTH_BYTES.get(size, 0)
    if start > len(data):
        return 0
    if size in _LENGTH_BYTES:
        size = int.from_bytes(data[at + 2 : start], "big")
    return start + (_MASK_BYTES if data[at + 1] & 0x80 else 0) + size
