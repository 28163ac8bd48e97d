"""The forwarded port by configuration: a number, or the file that a script (of gluetun or the VPN) writes it to."""

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class ForwardedPort:
    """`read` is cheap enough for once a second: the file is only opened after it changed."""

    def __init__(self, given: int | Path | None) -> None:
        self._path = given if isinstance(given, Path) else None
        self.port = given if isinstance(given, int) else None
        self._file_state: tuple[int, int, int] | None = None
        self._logged = False

    @property
    def is_file(self) -> bool:
        return self._path is not None

    def read(self) -> bool:
        """Check the file; returns whether the port changed."""
        if self._path is None:
            return False
        old = self.port
        try:
            found = self._path.stat()
            state = (found.st_ino, found.st_mtime_ns, found.st_size)
            if state == self._file_state:
                return False
            with self._path.open("rb") as file:
                self.port = port_of(file.read(256))
            self._file_state, trouble = state, None if self.port else "it holds no port"
        except OSError as e:
            self._file_state, self.port, trouble = None, None, e.strerror or os.strerror(e.errno or 0)
        if trouble is not None and not self._logged:
            log.warning("no forwarded port is known", extra={"file": str(self._path), "why": trouble})
        self._logged = trouble is not None
        return self.port != old


def port_of(content: bytes) -> int | None:
    """The number in the first line that is not empty; gluetun writes one line for each port."""
    words = content.split()
    if not words or not words[0].isdigit():
        return None
    port = int(words[0])
    return port if 0 < port < 2**16 else None
