"""What is fuzzed is a `Target`: a reader of the project's, called as the project calls it."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

Try = Callable[[bytes], None]
# Between the parts of an input that has several.
BETWEEN: Final = b"\n\xfe\n"
# What targets hold, for whoever uses one to close. libFuzzer ends a process without.
ENDS: Final = ExitStack()


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`modules` (below `vpn_sentinel`) read the input. `make` returns what takes one input, and raises for a fault
    alone: another exception than the documented one, a bound that is passed, a round trip that does not come back.

    `longest` is how many bytes an input has at most.
    """

    modules: tuple[str, ...]
    make: Callable[[], Try]
    longest: int = 4096


class Loop:
    """An event loop that lasts as long as a target."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        ENDS.callback(self.loop.close)
        # What a task or a callback raises where nobody waits for it is a fault like any other.
        self.loop.set_exception_handler(self._caught)
        self._raised: list[BaseException] = []

    def __call__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(coroutine)
        if self._raised:
            raise self._raised.pop()

    def _caught(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._raised.append(context.get("exception") or RuntimeError(context["message"]))


class File:
    """A file in memory whose content is each input in turn."""

    def __init__(self) -> None:
        self._file = os.memfd_create("input")
        ENDS.callback(os.close, self._file)
        self.path = f"/proc/self/fd/{self._file}"

    def hold(self, data: bytes) -> str:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, data, 0)
        return self.path


def scratch() -> Path:
    """A folder that goes with the target."""
    return Path(ENDS.enter_context(TemporaryDirectory(prefix="vs-fuzz-")))


class Wire(asyncio.Transport):
    """The network's end of a connection: what is written stays here."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__({"peername": ("203.0.113.9", 40000), "sockname": ("198.51.100.1", 5000)})
        self.written = bytearray()
        self._protocol: Any = protocol
        self._closing = False
        self._lost = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    def abort(self) -> None:
        self._closing = True

    def lose(self) -> None:
        """The connection has ended, whoever ended it."""
        if not self._lost:
            self._lost = self._closing = True
            self._protocol.connection_lost(None)

    def get_protocol(self) -> Any:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


def check(what: object, problem: str) -> None:
    """As `assert`, which -O leaves out."""
    if not what:
        raise AssertionError(problem)


def parts(data: bytes, number: int) -> Sequence[bytes]:
    """So many parts of an input; those that are missing are empty."""
    found = data.split(BETWEEN, number - 1)
    return [*found, *(b"" for _ in range(number - len(found)))]
