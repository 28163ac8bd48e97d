"""How long a health port takes to answer: `python -m bench.siege.probe PORT PATH`, until its input ends.

Asks over a new connection each quarter of a second. Prints one JSON object: `times` in seconds, and `failed`, how many
got no answer within `LIMIT` seconds, or were cut.
"""

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Final

LIMIT: Final = 10.0
EVERY: Final = 0.25


def fetch(port: int, path: str, limit: float = LIMIT) -> str:
    """What `path` on loopback answers, whatever the status. Raises OSError where there is no answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=limit) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as e:
        with e:
            return str(e.read().decode())
    except HTTPException as e:
        raise OSError(str(e)) from e


def main(port: int, path: str) -> None:
    times: list[float] = []
    failed = 0
    over = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    while not over.wait(EVERY):
        began = time.monotonic()
        try:
            fetch(port, path)
        except OSError:
            failed += 1
        else:
            times.append(time.monotonic() - began)
    print(json.dumps({"times": times, "failed": failed}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
