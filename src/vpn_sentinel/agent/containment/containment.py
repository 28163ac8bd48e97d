"""When the ways out beside the tunnel are closed and when they open again.

The rules stay in the kernel: they survive the agent, and its next start adopts them by the mark of their owner. Never
two owners: a table of another agent's is not touched.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from vpn_sentinel.agent.containment.nft import Nft, NftError
from vpn_sentinel.agent.containment.proof import Cause, PathOf, from_text, proven, to_text
from vpn_sentinel.agent.containment.rules import RELEASED, TABLE, Ways, forget_word, removal, render
from vpn_sentinel.agent.net.facts import FactStore
from vpn_sentinel.domain.observation import Observation, Outcome
from vpn_sentinel.domain.verdict import State, Verdict
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

ROUNDS: Final = 2  # that must prove the tunnel, one after the other
PROOF: Final = 4.0  # seconds from the first of them to the last
# A leak that comes back within an hour of the release was not gone: the proof takes longer each time.
_RELAPSE: Final = 3600.0
_LONGER: Final = (PROOF, 60.0, 300.0, 1800.0, 3600.0)
_CAUSE: Final = "containment.cause"


class Mode(StrEnum):
    OFF = "off"
    DRY_RUN = "dry-run"
    ON = "on"


class ContainmentFacts(FactStore, Protocol):
    """`identity` is the spool's."""

    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainmentDeps:
    """What containment stands on. `ways` may raise OSError, and returns None when no tunnel is known here.

    `owner_of` is containment.table's; `take_lock` says whether we are the one agent here that may write rules. `tell`
    gets the name, the outcome and the detail of each action.
    """

    ways: Callable[[Cause], Ways | None]
    path_of: PathOf
    nft: Nft
    owner_of: Callable[[str], str | None]
    take_lock: Callable[[], bool]
    tell: Callable[[str, Outcome, str], None]


def mark(client_id: str, spool: str) -> str:
    """The owner's mark: whose the table is, and by which spool it was made."""
    return f"{client_id}/{spool[:32]}"


class Containment:
    """Not to be entered twice at a time: one task drives it."""

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
        self._said = ""

    async def start(self) -> None:
        """Find out what stands here: adopt what is ours, remove it when containment is off, leave what is not ours."""
        try:
            owner = self._deps.owner_of(TABLE)
            if owner is not None and self._is_ours(owner):
                await self._found_ours()
            elif owner is not None:
                log.warning("another agent's containment stands here", extra={"owner": owner or "unnamed"})
            if self._mode is Mode.ON and self._deps.owner_of(RELEASED) is not None:
                await self._deps.nft(forget_word())
        except OSError as e:
            if self._mode is Mode.ON:
                log.warning("containment cannot work here", extra={"reason": why_not(e)})

    async def leaking(self, cause: Cause) -> None:
        """A leak is proven: close the ways out."""
        if self._mode is Mode.OFF:
            return
        self._proofs = 0
        if self.contained:
            self._cause |= cause
            await self._keep_up()
            return
        if not self._armed:
            return
        if self._mode is Mode.DRY_RUN:
            self._armed = False
            self._deps.tell("contain", Outcome.DRY_RUN, "the ways out beside the tunnel would be closed")
            return
        try:
            if (owner := self._deps.owner_of(TABLE)) is not None and not self._is_ours(owner):
                self._failed(f"the rules of another agent stand here: {owner or 'unnamed'}")
                return
            if not self._deps.take_lock():
                self._failed("another agent holds containment in this namespace")
                return
            self._cause = cause
            if await self._write():
                self._began()
        except (OSError, ValueError) as e:
            self._failed(why_not(e))

    async def saw(self, seen: Observation, verdict: Verdict) -> None:
        """A round that is no proven leak: look after the rules, and open again once the tunnel is proven."""
        if verdict.state not in (State.LEAKING, State.UNKNOWN):
            self._armed, self._said = True, ""
        if not self.contained:
            return
        await self._keep_up()
        if not self.contained:
            return
        now = self._clock.boottime()
        if not proven(seen, verdict, self._cause, self._deps.path_of):
            self._proofs = 0
            return
        if self._proofs == 0:
            self._first_proof = now
        self._proofs += 1
        needed = _LONGER[min(self._relapses, len(_LONGER) - 1)]
        if self._proofs >= ROUNDS and self._first_proof is not None and now - self._first_proof >= needed:
            await self._open(f"the tunnel is proven again, by {self._proofs} rounds in {now - self._first_proof:.0f} s")

    # -- what happens to the rules -------------------------------------------------------------------------------------

    async def _write(self) -> bool:
        """Put the rules in place; whether it was done. Raises OSError."""
        ways = self._deps.ways(self._cause)
        if ways is None:
            self._failed("no tunnel interface is known here: closing would cut off everything")
            return False
        text = render(ways, mark(self._client_id, self._facts.identity))
        # First: whoever adopts the rules after a kill must know what to prove before it opens them.
        self._facts.keep(_CAUSE, to_text(self._cause))
        if text == self._applied and self._deps.owner_of(TABLE) is not None:
            return True
        await self._deps.nft(text)
        self._applied = text
        return True

    def _began(self) -> None:
        self.contained = True
        now = self._clock.boottime()
        back = self._released_at is not None and now - self._released_at < _RELAPSE
        self._relapses = self._relapses + 1 if back else 0
        log.warning(
            "contained: only the tunnel, its endpoint and the LAN are open", extra={"cause": to_text(self._cause)}
        )
        self._deps.tell("contain", Outcome.DONE, "the ways out beside the tunnel are closed")

    async def _keep_up(self) -> None:
        """Follow endpoints and networks that changed; put back what somebody else swept away; obey a release."""
        try:
            owner = self._deps.owner_of(TABLE)
            if owner is None and self._deps.owner_of(RELEASED) is not None:
                await self._deps.nft(forget_word())
                self._released()
                self._armed = False  # by its owner's will: the next leak closes it again, this one does not
                log.warning("released by hand: the next leak closes it again, this one does not")
                self._deps.tell("release", Outcome.DONE, "by hand")
                return
            if owner is not None and not self._is_ours(owner):
                self._released()
                self._failed(f"another agent took the rules over: {owner or 'unnamed'}")
                return
            if await self._write() and owner is None:
                log.warning("the containment was removed by something else and is put back")
                self._deps.tell("contain", Outcome.DONE, "put back: something else had removed the rules")
        except (OSError, ValueError) as e:
            self._failed(why_not(e))

    async def _open(self, why: str) -> None:
        try:
            await self._deps.nft(removal())
        except NftError as e:
            self._failed(why_not(e), name="release")
            return
        self._released()
        self._released_at = self._clock.boottime()
        log.warning("released", extra={"why": why})
        self._deps.tell("release", Outcome.DONE, why)

    def _released(self) -> None:
        self.contained = False
        self._applied = ""
        self._proofs = 0
        self._facts.keep(_CAUSE, "")

    async def _found_ours(self) -> None:
        """Rules of ours from before this start. Raises OSError."""
        if not self._deps.take_lock():
            log.warning("another agent of this name holds containment in this namespace")
        elif self._mode is Mode.ON:
            self.contained = True
            self._cause = from_text(self._facts.fact(_CAUSE))
            log.warning("still contained, since before this start", extra={"cause": to_text(self._cause)})
        else:
            await self._deps.nft(removal())
            log.warning("containment is not on: our rules of an earlier start are removed")
            self._deps.tell("release", Outcome.DONE, "containment is not on any more")

    # -- saying --------------------------------------------------------------------------------------------------------

    def _is_ours(self, owner: str) -> bool:
        return owner.rpartition("/")[0] == self._client_id

    def _failed(self, reason: str, *, name: str = "contain") -> None:
        """Say it once, until there is a round without a leak."""
        if reason == self._said:
            return
        self._said = reason
        log.error("containment failed", extra={"action": name, "reason": reason})
        self._deps.tell(name, Outcome.FAILED, reason)


def why_not(error: Exception) -> str:
    """Why nftables cannot be used, and what to do, in few words."""
    if isinstance(error, PermissionError):
        return "CAP_NET_ADMIN is missing: give it to the agent (Docker: cap_add: [NET_ADMIN])"
    return (getattr(error, "strerror", None) or str(error))[:160]
