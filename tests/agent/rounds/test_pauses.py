import asyncio
import os
import signal
import sys

from tests.conftest import ManualClock
from vpn_sentinel.agent.rounds.pauses import MIN_PAUSE_S, TICK_S, Pauses


def test_a_stretch_without_us_is_told_once() -> None:
    clock, told = ManualClock(), list[int]()
    pauses = Pauses(clock.boottime, lambda: told.append(1))
    began = clock.now
    clock.now += TICK_S + MIN_PAUSE_S
    assert not pauses.ended_since(began)
    clock.now += TICK_S + MIN_PAUSE_S + 0.1
    assert pauses.ended_since(began)
    assert pauses.ended_since(began)
    assert told == [1]
    assert not pauses.ended_since(clock.now + 0.1)


STOPPED = """
import asyncio, time
from vpn_sentinel.agent.rounds.pauses import Pauses
from vpn_sentinel.runtime.clock import SystemClock

async def main():
    told = asyncio.Event()
    pauses = Pauses(SystemClock().boottime, told.set)
    task = asyncio.create_task(pauses.run())
    print("runs", flush=True)
    await told.wait()
    print("was away", flush=True)
    task.cancel()

asyncio.run(main())
"""


async def test_a_process_that_was_stopped_knows() -> None:
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", STOPPED, env=env, stdout=-1)
    assert process.stdout is not None
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"runs\n"
        await asyncio.sleep(2 * TICK_S)
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(MIN_PAUSE_S + 2 * TICK_S)
        process.send_signal(signal.SIGCONT)
        assert await process.stdout.readline() == b"was away\n"
        assert await process.wait() == 0
