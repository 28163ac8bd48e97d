"""Tries each forwarded port from outside, as whoever wants to reach it would: by a TCP connection.

Only ever at an address that the tunnel's own packets came from (`Tracker.forwarded`), so that no agent can have this
server knock at somebody else's door.
"""

import asyncio
import errno
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.domain.observation import Answer, PortCheck
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.store.store import StoreUnavailable
from vpn_sentinel.server.tracking.group_commit import Busy
from vpn_sentinel.server.tracking.inputs import PortCheckResult

log = logging.getLogger(__name__)

CHECK_INTERVAL_S: Final = 60.0
# A tunnel that changes its port all the time is followed no faster than this.
_MIN_APART_S: Final = 30.0
_MAX_TRIES: Final = 3
_PAUSE_S: Final = 2.0
_CONNECT_TIMEOUT_S: Final = 5.0
_MAX_AT_ONCE: Final = 16
_TICK_S: Final = 1.0
# Nothing of this host leads there, or it forbids to ask: that says nothing of the port.
_OURS: Final = {
    errno.ENETUNREACH, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM,
    errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT,
}  # fmt: skip


Where = tuple[IPAddress, int]


@dataclass(slots=True)
class _Plan:
    where: Where
    due: float
    tried: float = 0.0
    asking: bool = False


async def knock(address: IPAddress, port: int, *, limit: float = _CONNECT_TIMEOUT_S) -> Answer:
    """Connect once and hang up. UNKNOWN when this host cannot ask."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            async with asyncio.timeout(limit):
                await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except ConnectionRefusedError:
        return Answer.UNREACHABLE
    except TimeoutError:
        return Answer.LOST
    except OSError as e:
        return Answer.UNKNOWN if e.errno in _OURS else Answer.LOST
    return Answer.ANSWERED


class Ports:
    """`forwarded` are the ports to try, by tunnel; `record` takes each result."""

    def __init__(
        self,
        forwarded: Mapping[str, Where],
        record: Callable[[PortCheckResult], Awaitable[None]],
        clock: Clock,
        *,
        knock: Callable[[IPAddress, int], Awaitable[Answer]] = knock,
        pause: float = _PAUSE_S,
        rng: random.Random | None = None,
    ) -> None:
        self._forwarded = forwarded
        self._record = record
        self._clock = clock
        self._knock = knock
        self._pause = pause
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._plans: dict[str, _Plan] = {}
        self._slots = asyncio.Semaphore(_MAX_AT_ONCE)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                for name, where in self.due():
                    group.create_task(self._try(name, where))
                await asyncio.sleep(_TICK_S)

    def due(self) -> list[tuple[str, Where]]:
        """The ports whose time has come; each is planned anew."""
        now, wanted = self._clock.boottime(), dict(self._forwarded)
        for name in [n for n in self._plans if n not in wanted]:
            del self._plans[name]
        found = []
        for name, where in wanted.items():
            plan = self._plans.get(name)
            if plan is None:
                plan = self._plans[name] = _Plan(where, now)
            elif plan.where != where:
                plan.where, plan.due = where, min(plan.due, max(now, plan.tried + _MIN_APART_S))
            if plan.due <= now and not plan.asking:
                plan.asking = True  # closed ports take long: however many there are, each waits for its turn once
                plan.tried, plan.due = now, now + CHECK_INTERVAL_S * self._rng.uniform(0.9, 1.1)
                found.append((name, where))
        return found

    async def _try(self, name: str, where: Where) -> None:
        plan = self._plans.get(name)
        try:
            async with self._slots:
                answer = await self._ask(where)
        finally:
            if plan is not None:
                plan.asking = False
        if answer is Answer.UNKNOWN or self._forwarded.get(name) != where:
            return
        check = PortCheck(address=where[0], port=where[1], answer=answer)
        try:
            await self._record(PortCheckResult(tunnel=name, check=check, at=self._clock.wall()))
        except (StoreUnavailable, Busy) as e:
            log.warning("a forwarded port's state was not kept", extra={"tunnel": name, "reason": str(e)})
        except Exception:
            # One bad row, say of a newer version, must not keep the others' ports from being tried.
            log.exception("a forwarded port's state cannot be kept", extra={"tunnel": name})

    async def _ask(self, where: Where) -> Answer:
        """One lost packet is no closed port: only the third silence counts."""
        answer = Answer.UNKNOWN
        for attempt in range(_MAX_TRIES):
            if attempt:
                await asyncio.sleep(self._pause)
            answer = await self._knock(*where)
            if answer is not Answer.LOST:
                break
        return answer
