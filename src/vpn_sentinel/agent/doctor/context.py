"""What the checks share: settings, the kernel's view, one round of canaries, and one hello to the server."""

import asyncio
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final, Generic, TypeVar

from vpn_sentinel import __version__
from vpn_sentinel.agent.doctor.lenient import DoctorSettings
from vpn_sentinel.agent.net.http import Client, HttpError, reason
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.agent.net.urls import split
from vpn_sentinel.agent.probes.canary import canaries
from vpn_sentinel.agent.rounds.canary_plan import canary_plan
from vpn_sentinel.agent.uplink.answers import own_refusal
from vpn_sentinel.domain.observation import Canary, Observation, Trigger
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.wire import codec
from vpn_sentinel.wire.messages import PROTOCOL, Exchange, FromServer, Hello, Reports, Welcome

T = TypeVar("T")
_REQUEST_TIMEOUT_S: Final = 4.0  # for one request to the server
_MAX_ADDRESSES_TRIED: Final = 4  # of one server name
_read_answer = codec.decoder(FromServer)


class SharedTask(Generic[T]):
    """A task that several checks wait for. A check that times out does not cancel it for the others."""

    def __init__(self, group: asyncio.TaskGroup, work: Coroutine[Any, Any, T]) -> None:
        self._task = group.create_task(self._with_error(work))

    async def result(self) -> T:
        """Raises the OSError that the task ended with."""
        await asyncio.wait([self._task])
        found = self._task.result()
        if isinstance(found, OSError):
            raise found
        return found

    @staticmethod
    async def _with_error(work: Coroutine[Any, Any, T]) -> T | OSError:
        try:
            return await work
        except OSError as e:  # raised where the result is read: here it would cancel the whole group
            return e

    def stop(self) -> None:
        self._task.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """How a server answered our hello. `status` is the HTTP status, None without an answer; `why` then is the reason.

    `ours` is false when something other than our server answered, such as a proxy or a login page.
    `date` is the server's time if the answer has one; `sent_at` and `received_at` are by our clock. All three are in
    seconds since 1970.
    """

    url: str
    status: int | None = None
    why: str = ""
    welcome: Welcome | None = None
    ours: bool = True
    date: float | None = None
    sent_at: float = 0.0
    received_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorContext:
    """`kernel` is None where netlink is not available. `observation` holds the canaries of one round."""

    settings: DoctorSettings
    clock: Clock
    kernel: Netlink | None
    survey: Survey
    paths: Paths
    http: Client
    observation: SharedTask[Observation]
    greetings: SharedTask[tuple[Greeting, ...]]


async def observe(settings: DoctorSettings, http: Client, survey: Survey, paths: Paths) -> Observation:
    """Canaries alone, about three seconds at most; no geolocation service is asked."""
    found: tuple[Canary, ...] = await canaries(canary_plan(settings.agent.probes, http, (), paths), paths)
    return Observation(trigger=Trigger.START, link=survey.link(), interfaces=survey.names(), canaries=found)


async def greet_all(settings: DoctorSettings, http: Client, clock: Clock) -> tuple[Greeting, ...]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(greet(settings, url, http, clock)) for url in settings.urls]
    return tuple(t.result() for t in tasks)


async def greet(settings: DoctorSettings, url: str, http: Client, clock: Clock) -> Greeting:
    """Say hello to all addresses of the server's name in parallel: as for the agent, one that answers is enough."""
    try:
        known = await http.names.addresses(split(url).host, patience=_REQUEST_TIMEOUT_S)
    except (OSError, ValueError) as e:
        return Greeting(url=url, why=reason(e))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_greet(settings, url, at, http, clock)) for at in known[:_MAX_ADDRESSES_TRIED]]
    greetings = [t.result() for t in tasks]
    return next((g for g in greetings if g.status is not None), greetings[0])


async def _greet(settings: DoctorSettings, url: str, at: IPAddress, http: Client, clock: Clock) -> Greeting:
    """Say hello by POST, without a report: the server checks key and name, answers, and stores nothing."""
    agent = settings.agent
    hello = Hello(
        protocol=PROTOCOL,
        client_id=agent.client_id,
        spool=secrets.token_hex(16),
        version=__version__,
        interval=agent.interval,
        wall=clock.wall(),
        policy=agent.probes.policy,
    )
    body = codec.encode(Exchange(hello=hello, reports=Reports(items=[])))
    headers = {"Content-Type": "application/json"}
    if agent.api_key:
        headers["X-API-Key"] = agent.api_key.reveal()
    sent = clock.wall()
    try:
        answer = await http.post(f"{url}{agent.api_path}/agent", body, headers, limit=_REQUEST_TIMEOUT_S, at=at)
    except HttpError as e:
        return Greeting(url=url, why=str(e))
    welcome = None
    if answer.status == 200:
        try:
            message = _read_answer(answer.body.decode("utf-8"))
        except ValueError:
            message = None
        welcome = message if isinstance(message, Welcome) else None
    date = welcome.wall if welcome else _date(answer.headers.get("date"))
    ours = welcome is not None or own_refusal(answer.status, answer.headers, answer.body) is not None
    return Greeting(
        url=url, status=answer.status, welcome=welcome, ours=ours, date=date, sent_at=sent, received_at=clock.wall()
    )


def _date(text: str | None) -> float | None:
    """An HTTP date (RFC 9110, section 5.6.7), None for anything else."""
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except (ValueError, OverflowError):
        return None
