"""Run the remedies that are due: each in a task of its own, one run of a remedy at a time."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Final

from vpn_sentinel.agent.net.facts import FactStore
from vpn_sentinel.agent.remedies.failure import RemedyError
from vpn_sentinel.agent.remedies.plan import Plan, RemedyMemory, RemedyRules, Step
from vpn_sentinel.agent.remedies.torrents import TorrentClient
from vpn_sentinel.domain.counted import counted
from vpn_sentinel.domain.observation import Observation, Outcome
from vpn_sentinel.domain.verdict import Verdict
from vpn_sentinel.runtime.clock import Clock, SteadyClock

log = logging.getLogger(__name__)

_MEMORY: Final = "remedies"
OnAction = Callable[[str, Outcome, str], None]
Hook = Callable[[bytes], Awaitable[str]]
Restart = Callable[[], Awaitable[str]]


class Remedies:
    """`saw` takes every round's verdict; `run` runs what is due until it is cancelled."""

    def __init__(
        self,
        wants: RemedyRules,
        facts: FactStore,
        clock: Clock,
        on_action: OnAction,
        *,
        client_id: str,
        hook: Hook | None = None,
        restart: Restart | None = None,
        clients: tuple[TorrentClient, ...] = (),
        dry_run: bool = False,
    ) -> None:
        self._plan = Plan(wants, RemedyMemory.from_text(facts.fact(_MEMORY)))
        self._facts = facts
        self._clock = clock
        # Tries are counted by the hour, so a change of the wall clock must not matter.
        self._steady = SteadyClock(clock)
        self._on_action = on_action
        self._client_id = client_id
        self._hook = hook
        self._restart = restart
        self._clients: Mapping[str, TorrentClient] = {c.name: c for c in clients}
        self._dry_run = dry_run
        self._due: asyncio.Queue[tuple[Step, bytes]] = asyncio.Queue()
        self._busy: set[str] = set()

    def saw(self, seen: Observation, verdict: Verdict) -> None:
        """Take a round's result. What is due starts in the background."""
        last_notified = self._plan.memory.last_notified
        for step in self._plan.due(verdict, self._clock.boottime(), self._steady.wall()):
            if step.name in self._busy:
                continue
            if step.held is not None:
                log.warning("a remedy is held back", extra={"remedy": step.name, "reason": step.held})
                self._on_action(step.name, Outcome.HELD, step.held)
                continue
            self._busy.add(step.name)
            self._plan.tried(step, self._steady.wall())
            self._due.put_nowait((step, document(seen, verdict, last_notified, self._client_id, self._clock.wall())))
        self._remember()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                step, text = await self._due.get()
                group.create_task(self._do(step, text))

    async def _do(self, step: Step, text: bytes) -> None:
        outcome, detail = Outcome.DONE, ""
        try:
            if self._dry_run:
                outcome, detail = Outcome.DRY_RUN, "would have been done"
            else:
                detail = await self._call(step, text)
        except RemedyError as e:
            outcome, detail = Outcome.FAILED, str(e)
        finally:
            self._busy.discard(step.name)
        level = logging.WARNING if outcome is Outcome.FAILED else logging.INFO
        log.log(level, "remedy", extra={"remedy": step.name, "outcome": outcome, "detail": detail})
        self._plan.ended(step, well=outcome is not Outcome.FAILED, dry=outcome is Outcome.DRY_RUN)
        self._remember()
        self._on_action(step.name, outcome, detail)

    async def _call(self, step: Step, text: bytes) -> str:
        """Raises RemedyError."""
        if step.name == "hook" and self._hook is not None:
            return await self._hook(text)
        if step.name == "gluetun_restart" and self._restart is not None:
            return await self._restart()
        client = self._clients.get(step.client)
        if client is None:
            raise RemedyError("is not configured any more")
        if step.name.endswith("_pause"):
            running = await client.pause()
            self._facts.keep(_running_fact(client), json.dumps(running))
            return f"paused {counted(len(running), 'torrent')}"
        running = tuple(str(h) for h in json.loads(self._facts.fact(_running_fact(client)) or "[]"))
        await client.resume(running)
        self._facts.keep(_running_fact(client), "[]")
        return f"resumed {counted(len(running), 'torrent')}"

    def _remember(self) -> None:
        self._facts.keep(_MEMORY, self._plan.memory.to_text())


def document(seen: Observation, verdict: Verdict, before: str | None, client_id: str, wall: float) -> bytes:
    """What the command gets on its standard input: one JSON object. Unknown values are null."""
    exits = {f"ipv{family}": str(seen.exit(family)) if seen.exit(family) else None for family in (4, 6)}
    link = seen.link
    return json.dumps(
        {
            "client_id": client_id,
            "at": datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds"),
            "state": verdict.state,
            "previous": before,
            "findings": [
                {"code": f.code, "severity": f.severity, "message": f.message, "evidence": dict(f.evidence)}
                for f in verdict.findings
            ],
            "exit": exits,
            "tunnel": {"interface": link.name, "present": link.present, "up": link.up} if link else None,
            "contained": seen.contained,
        }
    ).encode()


def _running_fact(client: TorrentClient) -> str:
    return f"remedies.{client.name}"
