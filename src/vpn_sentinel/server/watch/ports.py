"""Tries each forwarded port from outside, with a TCP connection.

Only at an address that the tunnel's own packets came from (`Tracker.forwarded`), so that no agent can make this server
connect to somebody else.
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
# A tunnel that changes its port often is not checked more often than this.
_MIN_RETRY_S: Final = 30.0
_MAX_ATTEMPTS: Final = 3
_ATTEMPT_PAUSE_S: Final = 2.0
_CONNECT_TIMEOUT_S: Final = 5.0
_MAX_CONCURRENT: Final = 16
_TICK_S: Final = 1.0
# This host has no route or forbids the connection, or lacks resources: unrelated to the port.
_LOCAL_ERRNOS: Final = {
    errno.ENETUNREACH, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM,
    errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT,
}  # fmt: skip


Endpoint = tuple[IPAddress, int]


@dataclass(slots=True)
class _Schedule:
    endpoint: Endpoint
    due: float
    tried: float = 0.0
    running: bool = False


async def try_connect(address: IPAddress, port: int, *, timeout_s: float = _CONNECT_TIMEOUT_S) -> Answer:
    """Connect once and close. UNKNOWN when this host itself cannot connect."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except ConnectionRefusedError:
        return Answer.UNREACHABLE
    except TimeoutError:
        return Answer.LOST
    except OSError as e:
        return Answer.UNKNOWN if e.errno in _LOCAL_ERRNOS else Answer.LOST
    return Answer.ANSWERED


class PortChecker:
    """`forwarded` are the ports to try, by tunnel; `record` stores each result."""

    def __init__(
        self,
        forwarded: Mapping[str, Endpoint],
        record: Callable[[PortCheckResult], Awaitable[None]],
        clock: Clock,
        *,
        try_connect: Callable[[IPAddress, int], Awaitable[Answer]] = try_connect,
        pause: float = _ATTEMPT_PAUSE_S,
        rng: random.Random | None = None,
    ) -> None:
        self._forwarded = forwarded
        self._record = record
        self._clock = clock
        self._knock = try_connect
        self._pause = pause
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._plans: dict[str, _Schedule] = {}
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                for name, endpoint in self.due():
                    group.create_task(self._try(name, endpoint))
                await asyncio.sleep(_TICK_S)

    def due(self) -> list[tuple[str, Endpoint]]:
        """The ports that are due; the next check of each is scheduled."""
        now, wanted = self._clock.boottime(), dict(self._forwarded)
        for name in [n for n in self._plans if n not in wanted]:
            del self._plans[name]
        found = []
        for name, endpoint in wanted.items():
            plan = self._plans.get(name)
            if plan is None:
                plan = self._plans[name] = _Schedule(endpoint, now)
            elif plan.endpoint != endpoint:
                plan.endpoint, plan.due = endpoint, min(plan.due, max(now, plan.tried + _MIN_RETRY_S))
            if plan.due <= now and not plan.running:
                plan.running = (
                    True  # closed ports take long: each waits for a slot at most once, however many there are
                )
                plan.tried, plan.due = now, now + CHECK_INTERVAL_S * self._rng.uniform(0.9, 1.1)
                found.append((name, endpoint))
        return found

    async def _try(self, name: str, endpoint: Endpoint) -> None:
        plan = self._plans.get(name)
        try:
            async with self._slots:
                answer = await self._ask(endpoint)
        finally:
            if plan is not None:
                plan.running = False
        if answer is Answer.UNKNOWN or self._forwarded.get(name) != endpoint:
            return
        check = PortCheck(address=endpoint[0], port=endpoint[1], answer=answer)
        try:
            await self._record(PortCheckResult(tunnel=name, check=check, at=self._clock.wall()))
        except (StoreUnavailable, Busy) as e:
            log.warning("a forwarded port's check was not stored", extra={"tunnel": name, "reason": str(e)})
        except Exception:
            # One bad row, such as a newer version's, must not keep other ports from being tried.
            log.exception("a forwarded port's check cannot be stored", extra={"tunnel": name})

    async def _ask(self, endpoint: Endpoint) -> Answer:
        """Try up to `_MAX_ATTEMPTS` times: a lost packet does not mean a closed port."""
        answer = Answer.UNKNOWN
        for attempt in range(_MAX_ATTEMPTS):
            if attempt:
                await asyncio.sleep(self._pause)
            answer = await self._knock(*endpoint)
            if answer is not Answer.LOST:
                break
        return answer
