"""When traffic outside the tunnel is blocked, and when it is released.

The rules stay in the kernel: they survive the agent, and its next start adopts them by the mark of their owner. A table
of another agent is never touched.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from vpn_sentinel.agent.containment.nft import Nft, NftError
from vpn_sentinel.agent.containment.proof import Cause, PathOf, from_text, proven, to_text
from vpn_sentinel.agent.containment.rules import (
    RELEASED_TABLE,
    TABLE,
    AllowedTraffic,
    removal,
    remove_release_marker,
    render,
)
from vpn_sentinel.agent.net.facts import FactStore
from vpn_sentinel.domain.observation import Observation, Outcome
from vpn_sentinel.domain.verdict import State, Verdict
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

MIN_PROOF_ROUNDS: Final = 2  # rounds in a row that must prove the tunnel
MIN_PROOF_S: Final = 4.0  # from the first of them to the last
# A leak that returns within this time after a release was not repaired: each time the proof must last longer.
_RELAPSE_WINDOW_S: Final = 3600.0
_PROOF_DURATIONS_S: Final = (MIN_PROOF_S, 60.0, 300.0, 1800.0, 3600.0)
_CAUSE_FACT: Final = "containment.cause"


class Mode(StrEnum):
    OFF = "off"
    DRY_RUN = "dry-run"
    ON = "on"


class ContainmentFacts(FactStore, Protocol):
    """`identity` is the spool's."""

    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainmentDeps:
    """What containment needs. `allowed` may raise OSError, and returns None when no tunnel is known here.

    `owner_of` is containment.table's; `take_lock` returns whether this agent is the one that may write rules here.
    `on_action` gets the name, the outcome and the detail of each action.
    """

    allowed: Callable[[Cause], AllowedTraffic | None]
    path_of: PathOf
    nft: Nft
    owner_of: Callable[[str], str | None]
    take_lock: Callable[[], bool]
    on_action: Callable[[str, Outcome, str], None]


def owner_mark(client_id: str, spool: str) -> str:
    """The owner's mark: the agent that owns the table, and the spool of the run that made it."""
    return f"{client_id}/{spool[:32]}"


class Containment:
    """Not reentrant: one task drives it."""

    def __init__(
        self, mode: Mode, client_id: str, facts: ContainmentFacts, deps: ContainmentDeps, clock: Clock
    ) -> None:
        self.contained = False
        self._mode = mode
        self._client_id = client_id
        self._facts = facts
        self._deps = deps
        self._clock = clock
        self._armed = True
        self._applied = ""
        self._cause = Cause()
        self._first_proof: float | None = None
        self._proofs = 0
        self._relapses = 0
        self._released_at: float | None = None
        self._logged_failure = ""

    async def start(self) -> None:
        """Read the table: adopt this agent's own, remove it when containment is off, leave another agent's."""
        try:
            owner = self._deps.owner_of(TABLE)
            if owner is not None and self._is_own(owner):
                await self._adopt_or_remove()
            elif owner is not None:
                log.warning("another agent's containment is active here", extra={"owner": owner or "unnamed"})
            if self._mode is Mode.ON and self._deps.owner_of(RELEASED_TABLE) is not None:
                await self._deps.nft(remove_release_marker())
        except OSError as e:
            if self._mode is Mode.ON:
                log.warning("containment cannot work here", extra={"reason": failure_reason(e)})

    async def leaking(self, cause: Cause) -> None:
        """Contain a proven leak."""
        if self._mode is Mode.OFF:
            return
        self._proofs = 0
        if self.contained:
            self._cause |= cause
            await self._maintain()
            return
        if not self._armed:
            return
        if self._mode is Mode.DRY_RUN:
            self._armed = False
            self._deps.on_action("contain", Outcome.DRY_RUN, "the ways out beside the tunnel would be closed")
            return
        try:
            if (owner := self._deps.owner_of(TABLE)) is not None and not self._is_own(owner):
                self._failed(f"the rules of another agent are active here: {owner or 'unnamed'}")
                return
            if not self._deps.take_lock():
                self._failed("another agent holds containment in this namespace")
                return
            self._cause = cause
            if await self._write():
                self._on_contained()
        except (OSError, ValueError) as e:
            self._failed(failure_reason(e))

    async def saw(self, seen: Observation, verdict: Verdict) -> None:
        """Take a round without a proven leak: maintain the rules, and remove them once the tunnel is proven."""
        if verdict.state not in (State.LEAKING, State.UNKNOWN):
            self._armed, self._logged_failure = True, ""
        if not self.contained:
            return
        await self._maintain()
        if not self.contained:
            return
        now = self._clock.boottime()
        if not proven(seen, verdict, self._cause, self._deps.path_of):
            self._proofs = 0
            return
        if self._proofs == 0:
            self._first_proof = now
        self._proofs += 1
        needed = _PROOF_DURATIONS_S[min(self._relapses, len(_PROOF_DURATIONS_S) - 1)]
        if self._proofs >= MIN_PROOF_ROUNDS and self._first_proof is not None and now - self._first_proof >= needed:
            await self._open(f"the tunnel is proven again, by {self._proofs} rounds in {now - self._first_proof:.0f} s")

    # -- the rules -----------------------------------------------------------------------------------------------------

    async def _write(self) -> bool:
        """Write the rules; return whether they are in place. Raises OSError."""
        allowed = self._deps.allowed(self._cause)
        if allowed is None:
            self._failed("no tunnel interface is known here: closing would cut off everything")
            return False
        text = render(allowed, owner_mark(self._client_id, self._facts.identity))
        # Before the rules: a start that adopts them after a kill must know what to prove before it removes them.
        self._facts.keep(_CAUSE_FACT, to_text(self._cause))
        if text == self._applied and self._deps.owner_of(TABLE) is not None:
            return True
        await self._deps.nft(text)
        self._applied = text
        return True

    def _on_contained(self) -> None:
        self.contained = True
        now = self._clock.boottime()
        is_relapse = self._released_at is not None and now - self._released_at < _RELAPSE_WINDOW_S
        self._relapses = self._relapses + 1 if is_relapse else 0
        log.warning(
            "contained: only the tunnel, its endpoint and the LAN are open", extra={"cause": to_text(self._cause)}
        )
        self._deps.on_action("contain", Outcome.DONE, "the ways out beside the tunnel are closed")

    async def _maintain(self) -> None:
        """Follow changed endpoints and networks, restore rules that something else removed, obey a release by hand."""
        try:
            owner = self._deps.owner_of(TABLE)
            if owner is None and self._deps.owner_of(RELEASED_TABLE) is not None:
                await self._deps.nft(remove_release_marker())
                self._on_released()
                self._armed = False  # the user released this leak; the next one is contained again
                log.warning("released by hand: the next leak closes it again, this one does not")
                self._deps.on_action("release", Outcome.DONE, "by hand")
                return
            if owner is not None and not self._is_own(owner):
                self._on_released()
                self._failed(f"another agent took the rules over: {owner or 'unnamed'}")
                return
            if await self._write() and owner is None:
                log.warning("the containment was removed by something else and is put back")
                self._deps.on_action("contain", Outcome.DONE, "put back: something else had removed the rules")
        except (OSError, ValueError) as e:
            self._failed(failure_reason(e))

    async def _open(self, why: str) -> None:
        try:
            await self._deps.nft(removal())
        except NftError as e:
            self._failed(failure_reason(e), name="release")
            return
        self._on_released()
        self._released_at = self._clock.boottime()
        log.warning("released", extra={"why": why})
        self._deps.on_action("release", Outcome.DONE, why)

    def _on_released(self) -> None:
        self.contained = False
        self._applied = ""
        self._proofs = 0
        self._facts.keep(_CAUSE_FACT, "")

    async def _adopt_or_remove(self) -> None:
        """Take over this agent's rules from before this start, or remove them. Raises OSError."""
        if not self._deps.take_lock():
            log.warning("another agent of this name holds containment in this namespace")
        elif self._mode is Mode.ON:
            self.contained = True
            self._cause = from_text(self._facts.fact(_CAUSE_FACT))
            log.warning("still contained, since before this start", extra={"cause": to_text(self._cause)})
        else:
            await self._deps.nft(removal())
            log.warning("containment is not on: this agent's rules of an earlier start are removed")
            self._deps.on_action("release", Outcome.DONE, "containment is not on any more")

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _is_own(self, owner: str) -> bool:
        return owner.rpartition("/")[0] == self._client_id

    def _failed(self, reason: str, *, name: str = "contain") -> None:
        """Report a failure once, until there is a round without a leak."""
        if reason == self._logged_failure:
            return
        self._logged_failure = reason
        log.error("containment failed", extra={"action": name, "reason": reason})
        self._deps.on_action(name, Outcome.FAILED, reason)


def failure_reason(error: Exception) -> str:
    """Why nftables cannot be used, and what to do, in at most 160 characters."""
    if isinstance(error, PermissionError):
        return "CAP_NET_ADMIN is missing: give it to the agent (Docker: cap_add: [NET_ADMIN])"
    return (getattr(error, "strerror", None) or str(error))[:160]
