"""The process of one target, which atheris (libFuzzer) makes its own: `python -m bench.fuzz.worker TARGET OPTIONS`.

Options are libFuzzer's (https://llvm.org/docs/LibFuzzer.html#options). Where there is no wheel of atheris, inputs are
made without looking at what they lead to, and of the options `-runs` and `-max_total_time` count.
"""

import logging
import random
import sys
import time
from importlib import import_module
from itertools import count

from bench.fuzz.mutate import corpus, mutated
from bench.fuzz.target import ENDS, Try

# What is watched for new ways through it. httptools and msgspec are C, and are not.
WATCHED = ["vpn_sentinel", "wsproto", "websockets", "uvicorn", "maxminddb", "tomllib"]


def main() -> None:
    name, *options = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    try:
        import atheris
    except ImportError:
        target = import_module("bench.fuzz.targets").TARGETS[name]
        with ENDS:
            _blind(name, target.make(), target.longest, dict(o.lstrip("-").split("=", 1) for o in options if "=" in o))
        return
    with atheris.instrument_imports(include=WATCHED):
        table = import_module("bench.fuzz.targets")
    atheris.Setup([sys.argv[0], *options], table.TARGETS[name].make())
    atheris.Fuzz()


def _blind(name: str, one: Try, longest: int, options: dict[str, str]) -> None:
    inputs = mutated(corpus(name), random.Random(int(options["seed"])), longest)
    most, until = int(options["runs"]), time.monotonic() + int(options["max_total_time"])
    for number, data in zip(count(1), inputs, strict=False):
        try:
            one(data)
        except BaseException:
            with open(f"{options['artifact_prefix']}crash", "wb") as file:  # noqa: PTH123 - a prefix, no folder
                file.write(data)
            raise
        over = number == most or time.monotonic() > until
        if over or number & number - 1 == 0:
            print(f"#{number}\tblind", file=sys.stderr, flush=True)
        if over:
            return


if __name__ == "__main__":
    main()
