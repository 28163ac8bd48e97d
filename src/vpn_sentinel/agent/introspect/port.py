"""The forwarded port as its owner gives it: a number, or the file that a script (gluetun's, the VPN's) writes it to."""

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class ForwardedPort:
    """`read` is cheap enough for once a second: the file is opened only when it became another one."""

    def __init__(self, given: int | Path | None) -> None:
        self._path = given if isinstance(given, Path) else None
        self.port = given if isinstance(given, int) else None
        self._mark: tuple[int, int, int] | None = None
        self._said = False

    @property
    def is_file(self) -> bool:
        return self._path is not None

    def read(self) -> bool:
        """Look at the file; whether the port is another one now."""
        if self._path is None:
            return False
        old = self.port
        try:
            found = self._path.stat()
            mark = (found.st_ino, found.st_mtime_ns, found.st_size)
            if mark == self._mark:
                return False
            with self._path.open("rb") as file:
                self.port = port_of(file.read(256))
            self._mark, trouble = mark, None if self.port else "it holds no port"
        except OSError as e:
            self._mark, self.port, trouble = None, None, e.strerror or os.strerror(e.errno or 0)
        if trouble is not None and not self._said:
            log.warning("no forwarded port is known", extra={"file": str(self._path), "why": trouble})
        self._said = trouble is not None
        return self.port != old


def port_of(content: bytes) -> int | None:
    """The number in the first line that is not empty; gluetun writes one line for each port."""
    words = content.split()
    if not words or not words[0].isdigit():
        return None
    port = int(words[0])
    return port if 0 < port < 2**16 else None
