"""The table of all targets: whoever writes a reader adds it here (`tests/fuzz/test_fuzz.py` finds those without)."""

from typing import Final

from bench.fuzz import doors, packets, services, texts
from bench.fuzz.target import Target

TARGETS: Final[dict[str, Target]] = packets.TARGETS | services.TARGETS | texts.TARGETS | doors.TARGETS
