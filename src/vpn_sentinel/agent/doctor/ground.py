"""What the checks share: settings, the kernel's view, one round of canaries, and one greeting of the server."""

import asyncio
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final, Generic, TypeVar

from vpn_sentinel import __version__
from vpn_sentinel.agent.doctor.forgiving import DoctorSettings
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
LIMIT: Final = 4.0  # seconds for one request to the server
_ADDRESSES: Final = 4  # of one name, that are asked
_read_answer = codec.decoder(FromServer)


class Once(Generic[T]):
    """Work that several checks wait for; one that gives up waiting does not stop it for the others."""

    def __init__(self, group: asyncio.TaskGroup, work: Coroutine[Any, Any, T]) -> None:
        self._task = group.create_task(self._kept(work))

    async def result(self) -> T:
        """Raises the OSError that the work ended in."""
        await asyncio.wait([self._task])
        found = self._task.result()
        if isinstance(found, OSError):
            raise found
        return found

    @staticmethod
    async def _kept(work: Coroutine[Any, Any, T]) -> T | OSError:
        try:
            return await work
        except OSError as e:  # for those who wait, and not for the whole group
            return e

    def stop(self) -> None:
        self._task.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """How a server took our hello. `status` is HTTP's, None when there was no answer, and `why` then says why not.

    `ours` is false where the answer is not our server's, but somebody's on the way.
    `date` is the time by its clock, in seconds since 1970, where it told one; `sent` and `came` are ours.
    """

    url: str
    status: int | None = None
    why: str = ""
    welcome: Welcome | None = None
    ours: bool = True
    date: float | None = None
    sent: float = 0.0
    came: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """`kernel` is None where netlink is not to be had. `look` are the canaries of one round."""

    read: DoctorSettings
    clock: Clock
    kernel: Netlink | None
    survey: Survey
    paths: Paths
    http: Client
    look: Once[Observation]
    greetings: Once[tuple[Greeting, ...]]


async def look(read: DoctorSettings, http: Client, survey: Survey, paths: Paths) -> Observation:
    """Canaries alone, at most about three seconds; nobody's geolocation service is asked."""
    found: tuple[Canary, ...] = await canaries(canary_plan(read.agent.probes, http, (), paths), paths)
    return Observation(trigger=Trigger.START, link=survey.link(), interfaces=survey.names(), canaries=found)


async def greet_all(read: DoctorSettings, http: Client, clock: Clock) -> tuple[Greeting, ...]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(greet(read, url, http, clock)) for url in read.urls]
    return tuple(t.result() for t in tasks)


async def greet(read: DoctorSettings, url: str, http: Client, clock: Clock) -> Greeting:
    """Say hello at the addresses of the server's name, at once: as for the agent, one that answers is enough."""
    try:
        known = await http.names.addresses(split(url).host, patience=LIMIT)
    except (OSError, ValueError) as e:
        return Greeting(url=url, why=reason(e))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_greet(read, url, at, http, clock)) for at in known[:_ADDRESSES]]
    said = [t.result() for t in tasks]
    return next((g for g in said if g.status is not None), said[0])


async def _greet(read: DoctorSettings, url: str, at: IPAddress, http: Client, clock: Clock) -> Greeting:
    """Say hello by POST, without a report: the server checks key and name, answers, and stores nothing."""
    agent = read.agent
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
        answer = await http.post(f"{url}{agent.api_path}/agent", body, headers, limit=LIMIT, at=at)
    except HttpError as e:
        return Greeting(url=url, why=str(e))
    welcome = None
    if answer.status == 200:
        try:
            said = _read_answer(answer.body.decode("utf-8"))
        except ValueError:
            said = None
        welcome = said if isinstance(said, Welcome) else None
    date = welcome.wall if welcome else _date(answer.headers.get("date"))
    ours = welcome is not None or own_refusal(answer.status, answer.headers, answer.body) is not None
    return Greeting(url=url, status=answer.status, welcome=welcome, ours=ours, date=date, sent=sent, came=clock.wall())


def _date(text: str | None) -> float | None:
    """An HTTP date (RFC 9110, section 5.6.7), None for anything else."""
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except (ValueError, OverflowError):
        return None
