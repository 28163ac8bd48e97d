"""What the server itself sees of each agent's pulses: from where, how many, and whether its replies arrive.

It holds when the replies die on their way, so a one-way leak is still seen. One small record for each tunnel that was
greeted here or has a row in the database; nothing a stranger sends makes one.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.domain.policy import IPAddress, is_public
from vpn_sentinel.wire import echo, pulse

WINDOW_NUMBERS: Final = 128  # numbers that the replay window spans
_MASK: Final = (1 << WINDOW_NUMBERS) - 1
_MAX_RUNS: Final = 8  # runs of one agent whose numbers are remembered
# Seconds without a pulse of the run that counts until another may take its place: an agent sends one a second.
_QUIET_S: Final = 6.0
# More seconds than this between two pulses are a gap: one that was lost, or a line that was dead.
_GAP_S: Final = 3.0
_REFUSED_S: Final = 10.0  # seconds that what came by a key before it was refused may take to be stored
MAX_TUNNELS: Final = 50_000  # tunnels that are known at a time
# Pulses in a row, over so many seconds, that tell of no new reply, before the replies count as unheard. An agent whose
# pulses go unanswered sends ten within 3 s; of which, at 30 % loss, all are lost once in 100,000 times.
_UNHEARD_PULSES: Final = 8
_UNHEARD_S: Final = 2.5
# A longer gap between two pulses counts as no more: a line that stood still, or this server, holds them back and then
# delivers all at once, and they could know of no answer yet.
_GAP_COUNTS_S: Final = 1.0  # seconds
_REPEAT_S: Final = 3.0  # seconds until what stays unheard is told again
# When most agents hear nothing at once, it is this server's own way back that is dead, and no tunnel.
_MIN_AGENTS: Final = 5
_RECENT_S: Final = 10.0  # seconds since its last pulse that an agent counts as one of them


class ReplayWindow:
    """Which numbers of a run were taken: each at most once, none that is too old (RFC 6479 explains such windows)."""

    __slots__ = ("_bits", "_top")

    def __init__(self) -> None:
        self._top = 0
        self._bits = 0

    def take(self, number: int) -> bool:
        """Whether `number` (1 and up) comes for the first time and is not behind the window."""
        ahead = number - self._top
        if ahead > 0:
            self._bits = ((self._bits << ahead) | 1) & _MASK if ahead < WINDOW_NUMBERS else 1
            self._top = number
            return True
        if number < 1 or -ahead >= WINDOW_NUMBERS or self._bits >> -ahead & 1:
            return False
        self._bits |= 1 << -ahead
        return True


@dataclass(slots=True)
class PulseRecord:
    """One tunnel's pulses. Times are by a clock that never jumps. Of `windows`, by run, the newest used is the last.

    Since `steady` they have come without a gap. `greeted` is the caller's key of the last greeting here, None when the
    tunnel is known from the database alone. `heard` is the newest reply that the agent told of; since then `waiting`
    pulses have come, over `waited` seconds, in which a long gap counts for little.
    """

    name: str
    key: bytes
    greeted: str | None = None
    run: int = -1
    windows: dict[int, ReplayWindow] = field(default_factory=dict)
    host: str = ""
    packed: bytes = b""
    address: IPAddress | None = None
    by_family: dict[int, IPAddress] = field(default_factory=dict)
    last: float = -math.inf
    steady: float = -math.inf
    heard: int = 0
    waited: float = 0.0
    waiting: int = 0
    unheard: bool = False
    told: float = -math.inf


@dataclass(frozen=True, slots=True)
class PulseNews:
    """News of one tunnel: its pulses come from `address`, and whether it hears the replies."""

    name: str
    address: IPAddress
    unheard: bool


class PulseRegistry:
    """`told` is called with news, in the middle of a datagram's handling: it must only take note."""

    def __init__(self, secret: bytes, told: Callable[[PulseNews], None] = lambda _: None) -> None:
        self._secret = secret
        self._told = told
        self._records: OrderedDict[bytes, PulseRecord] = OrderedDict()
        self._banned: dict[str, float] = {}  # by name, when a key was refused
        self._most_hear_nothing = False  # as it was counted last
        self._count_again_at = -math.inf

    def __len__(self) -> int:
        return len(self._records)

    def greet(self, name: str, key: str) -> None:
        """Answer the pulses of this tunnel from now on: its agent showed `key` (of `access.Caller`)."""
        self._banned.pop(name, None)
        self._add(name).greeted = key

    def know(self, seen: Mapping[str, float]) -> None:
        """The same for tunnels that the database holds, and when each reported last, besides those that were refused.

        One that has reported since came by another key, maybe to another replica.
        """
        for name, at in seen.items():
            if at > self._banned.get(name, -math.inf) + _REFUSED_S:
                self._banned.pop(name, None)
                self._add(name)

    def forget(self, name: str, key: str, at: float) -> None:
        """Answer this tunnel's pulses no more: `key` was refused. An agent that showed another one since stays."""
        ident = echo.ident_for(self._secret, name)
        record = self._records.get(ident)
        if record is not None and record.greeted not in (None, key):
            return
        self._banned[name] = at
        self._records.pop(ident, None)

    def find(self, ident: bytes) -> PulseRecord | None:
        return self._records.get(ident)

    def steady(self, name: str) -> tuple[float, float] | None:
        """From when to when pulses of `name` have come without a gap; None when none has, or over a LAN alone."""
        record = self._records.get(echo.ident_for(self._secret, name))
        if record is None or record.address is None or not is_public(record.address):
            return None
        return record.steady, record.last

    def key_for(self, ident: bytes) -> bytes:
        return echo.key_for(self._secret, ident)

    def _add(self, name: str) -> PulseRecord:
        ident = echo.ident_for(self._secret, name)
        record = self._records.get(ident)
        if record is not None:
            self._records.move_to_end(ident)
            return record
        record = self._records[ident] = PulseRecord(name, self.key_for(ident))
        if len(self._records) > MAX_TUNNELS:
            self._records.popitem(last=False)
        return record

    def came_from(self, record: PulseRecord, host: str) -> bytes:
        """The bytes of the address that a datagram came from, an IPv4-mapped one as the IPv4 address it is."""
        if host != record.host:
            record.host = host
            record.packed = pulse.packed(host)
        return record.packed

    def take(self, record: PulseRecord, said: pulse.Pulse, now: float) -> bool:
        """Note a genuine pulse; False for one that is a replay or too old, which changes nothing.

        While one run lives, another is answered and not believed: it may be an old one that somebody has kept, and
        sends from where he likes. A run that was replaced so can come back.
        """
        window = record.windows.pop(said.run, None) or ReplayWindow()
        taken = window.take(said.number)
        record.windows[said.run] = window
        if len(record.windows) > _MAX_RUNS:
            del record.windows[next(r for r in record.windows if r != record.run)]
        if not taken:
            return False
        if said.run != record.run:
            if now - record.last < _QUIET_S:
                return True
            self._new_run(record, said)
        if now - record.last > _GAP_S:
            record.steady = now
        record.waited += min(now - record.last, _GAP_COUNTS_S)
        record.last = now
        self._note_heard(record, said, now)
        self._note_address(record, now)
        return True

    def _new_run(self, record: PulseRecord, said: pulse.Pulse) -> None:
        """The agent was started anew, or this server was: nothing that was counted goes on."""
        record.run = said.run
        record.heard, record.waiting, record.waited = said.heard, 0, 0.0

    def _note_heard(self, record: PulseRecord, said: pulse.Pulse, now: float) -> None:
        if said.heard > record.heard:
            record.heard, record.waiting, record.waited = said.heard, 0, 0.0
            if record.unheard:
                record.unheard = False
                self._tell(record, now)
            return
        record.waiting += 1
        # Who never heard a reply may sit behind a firewall that takes none; only who did can have lost something.
        dead = record.heard > 0 and record.waiting >= _UNHEARD_PULSES and record.waited >= _UNHEARD_S
        if not dead or said.silent < 1000 * (_UNHEARD_S - 0.5):
            return
        record.unheard = True
        if now - record.told >= _REPEAT_S and not self._all_unheard(now):
            self._tell(record, now)

    def _all_unheard(self, now: float) -> bool:
        """Whether more than half of the agents that send seem to hear nothing; counted once a second at most."""
        if now >= self._count_again_at:
            recent = [r.waiting >= _UNHEARD_PULSES // 2 for r in self._records.values() if now - r.last < _RECENT_S]
            self._most_hear_nothing = len(recent) >= _MIN_AGENTS and 2 * sum(recent) > len(recent)
            self._count_again_at = now + 1.0
        return self._most_hear_nothing

    def _note_address(self, record: PulseRecord, now: float) -> None:
        family = 4 if len(record.packed) == 4 else 6
        last = record.by_family.get(family)
        if last is not None and last.packed == record.packed:
            record.address = last
            return
        record.address = record.by_family[family] = ip_address(record.packed)
        self._tell(record, now)

    def _tell(self, record: PulseRecord, now: float) -> None:
        record.told = now
        if record.address is not None:
            self._told(PulseNews(record.name, record.address, record.unheard))
