"""What the system counts as a process's, of one whose heap no other test has filled."""

import subprocess
import sys

import pytest

from vpn_sentinel.server.watch.memory import find_malloc_trim

SCATTERED = """
from vpn_sentinel.server.watch.memory import find_malloc_trim, resident_bytes

before = resident_bytes()
pieces = [b"x" * (3000 + n % 2000) for n in range(20_000)]
kept = pieces[::50]
del pieces
held = resident_bytes()
find_malloc_trim()(0)
print(before, held, resident_bytes())
"""


@pytest.mark.skipif(find_malloc_trim() is None, reason="this C library has no malloc_trim")
def test_what_lies_scattered_in_the_heap_is_given_back() -> None:
    ran = subprocess.run([sys.executable, "-c", SCATTERED], check=True, capture_output=True, text=True)
    before, held, after = (int(size) / 1e6 for size in ran.stdout.split())
    assert held > before + 60, "the C library gives it back by itself"
    assert after < before + 15
