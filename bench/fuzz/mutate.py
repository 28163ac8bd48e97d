"""Inputs made from others without looking at what they lead to: for the tests, and where there is no atheris."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

CORPUS: Final = Path(__file__).parents[2] / "tests" / "fuzz" / "corpus"
_ODD: Final = (
    b"\0",
    b"\xff",
    b"\0" * 4,
    b"\xff" * 4,
    b"\x7f\xff",
    b"\x80",
    b"-1",
    b"1e999",
    b"\r\n",
    b"\n",
    b"[",
    b'"',
)
_NESTED: Final = b"[" * 5000  # deeper than Python reads
_DIGITS: Final = b"9" * 5000  # more than int() takes


def corpus(name: str) -> list[bytes]:
    """The inputs that are kept for a target, in the order of their names."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def mutated(seeds: Sequence[bytes], dice: random.Random, longest: int) -> Iterator[bytes]:
    """Without end. The same `dice` make the same inputs."""
    while True:
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.choice((1, 1, 1, 2, 4, 8))):
            at = dice.randrange(len(data) + 1)
            match dice.randrange(8):
                case 0:
                    data[at : at + 1] = bytes([dice.randrange(256)])
                case 1 if data:
                    data[at % len(data)] ^= 1 << dice.randrange(8)
                case 2:
                    del data[at : at + dice.choice((1, 2, 4, 16, 4096))]
                case 3:
                    data[at:at] = data[at : at + dice.choice((1, 4, 16, 256))] * dice.choice((1, 2, 64))
                case 4:
                    data[at:at] = dice.choice(_ODD)
                case 5:
                    other = dice.choice(seeds)
                    start = dice.randrange(len(other) + 1)
                    data[at : at + dice.choice((0, 4, 64))] = other[start : start + dice.choice((1, 4, 64, 1024))]
                case 6:
                    data[at:at] = dice.randbytes(dice.choice((1, 2, 4, 32)))
                case _:
                    repeated = dice.choice((_DIGITS, _NESTED))
                    data[at:at] = repeated[: dice.choice((1, 2, 10, 20, 5000))]
        yield bytes(data[:longest])
