"""Running a long-lived command: signals, event loop, exit status."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence

from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.shortage import Untaken
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
        # Not from within: Python before 3.11.4 wraps in a group again what an `except*` raises.
        if failure is not None:
            raise failure from None
    return 0


async def _supervised(work: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Else a trace for each connection that cannot be taken.
    loop.set_exception_handler(Untaken(SystemClock().boottime).handle)
    _take_signals(loop, stop)
    await work(stop)


def _take_signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Undo what a parent left that would keep the program from ending, or from learning how a child ended."""
    stopping = {signal.SIGTERM}
    # A shell has what it starts with `&` ignore SIGINT: that Ctrl-C is meant for what is in front of it.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        stopping.add(signal.SIGINT)
    for number in stopping:
        loop.add_signal_handler(number, stop.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping)
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # the kernel would keep no child's status
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def first(errors: Sequence[BaseException]) -> BaseException:
    """The first plain exception in a group, however deep."""
    error = errors[0]
    return first(error.exceptions) if isinstance(error, BaseExceptionGroup) else error


def report(line: str) -> None:
    """Print for a person who started the program by hand."""
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stdout, flush=True)
