"""Run a long-lived command: signals, event loop, exit status."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence

from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.shortage import AcceptFailures
from vpn_sentinel.runtime.user_error import UserError


def run_until_stopped(work: Callable[[asyncio.Event], Awaitable[None]], *, fast: bool) -> int:
    """Run `work` with an event that SIGTERM sets, and SIGINT where it is not ignored; returns 0 after a clean end.

    With `fast` the loop is uvloop's, which the server needs for its datagrams and TLS connections. A UserError,
    alone or in a group, is raised as itself.
    """
    factory = None
    if fast:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        failure: BaseException | None = None
        try:
            runner.run(_supervised(work))
        except* UserError as group:
            failure = first(group.exceptions)
        # Not within the block: Python before 3.11.4 wraps what an `except*` raises in a group again.
        if failure is not None:
            raise failure from None
    return 0


async def _supervised(work: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Else there is a traceback for each connection that cannot be accepted.
    loop.set_exception_handler(AcceptFailures(SystemClock().boottime).handle)
    _take_signals(loop, stop)
    await work(stop)


def _take_signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Undo inherited signal settings that would prevent the end of the program, or the exit status of a child."""
    stopping = {signal.SIGTERM}
    # A shell makes processes that it starts with `&` ignore SIGINT: Ctrl-C is for the foreground process.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        stopping.add(signal.SIGINT)
    for number in stopping:
        loop.add_signal_handler(number, stop.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping)
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # else the kernel keeps no exit status of a child
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def first(errors: Sequence[BaseException]) -> BaseException:
    """The first plain exception in a group, however deep."""
    error = errors[0]
    return first(error.exceptions) if isinstance(error, BaseExceptionGroup) else error


def report(line: str) -> None:
    """Print for a person who started the program by hand."""
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stdout, flush=True)
