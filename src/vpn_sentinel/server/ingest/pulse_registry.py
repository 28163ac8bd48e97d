"""What the server itself sees of each agent's pulses: their source address, and whether its replies arrive.

It is noted even when the replies are lost, so a one-way leak is still seen. There is one small record for each tunnel
that was welcomed here or has a row in the database; no other datagram creates one.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.domain.policy import IPAddress, is_public
from vpn_sentinel.wire import echo, pulse

WINDOW_NUMBERS: Final = 128  # length of the replay window
_WINDOW_MASK: Final = (1 << WINDOW_NUMBERS) - 1
_MAX_RUNS: Final = 8  # runs of one agent whose numbers are remembered
# After this time without a pulse of the current run, another may replace it: an agent sends one a second.
_RUN_TIMEOUT_S: Final = 6.0
# A longer time between two pulses is a gap: pulses were lost, or the connection was down.
_GAP_S: Final = 3.0
# A report that came with a revoked key is stored at most this long after the revocation, which every server knows a
# few seconds later (see access). A later report came with another key.
REVOKED_KEY_MARGIN_S: Final = 10.0
MAX_TUNNELS: Final = 50_000
# Replies count as unheard after this many consecutive pulses, over this time, that confirm no new reply. An agent whose
# pulses are unanswered sends ten within 3 s; at 30 % loss, all ten are lost once in 100,000 times.
_UNHEARD_PULSES: Final = 8
_UNHEARD_S: Final = 2.5
# A longer gap between two pulses counts as this much: a blocked connection, or this server, may hold pulses back and
# then deliver all at once, and these could not yet confirm any reply.
_MAX_COUNTED_GAP_S: Final = 1.0
_NOTIFY_INTERVAL_S: Final = 3.0  # `on_change` is called again after this time while replies stay unheard
# When most agents hear nothing at the same time, this server's own route back is down, and not a tunnel.
_MIN_ACTIVE_AGENTS: Final = 5
_ACTIVE_S: Final = 10.0  # an agent whose last pulse is older does not count in this


class ReplayWindow:
    """The accepted numbers of a run: each once, none that is too old (RFC 6479 describes the window)."""

    __slots__ = ("_bits", "_top")

    def __init__(self) -> None:
        self._top = 0
        self._bits = 0

    def take(self, number: int) -> bool:
        """Whether `number` (1 and up) is new and not older than the window; it is not new from then on."""
        ahead = number - self._top
        if ahead > 0:
            self._bits = ((self._bits << ahead) | 1) & _WINDOW_MASK if ahead < WINDOW_NUMBERS else 1
            self._top = number
            return True
        if number < 1 or -ahead >= WINDOW_NUMBERS or self._bits >> -ahead & 1:
            return False
        self._bits |= 1 << -ahead
        return True


@dataclass(slots=True)
class PulseRecord:
    """One tunnel's pulses. Times are by a monotonic clock. `windows` are by run, the last used one at the end.

    They have come without a gap since `gapless_since`. `greeted_key` is the caller's key at the last welcome here, None
    when the tunnel is known only from the database. `heard` is the newest reply that the agent confirmed; since then
    `unanswered` pulses have come, over `unanswered_s` seconds, in which a long gap counts as `_MAX_COUNTED_GAP_S`.
    """

    name: str
    key: bytes
    greeted_key: str | None = None
    run: int = -1
    windows: dict[int, ReplayWindow] = field(default_factory=dict)
    host: str = ""
    packed: bytes = b""
    address: IPAddress | None = None
    by_family: dict[int, IPAddress] = field(default_factory=dict)
    last_at: float = -math.inf
    gapless_since: float = -math.inf
    heard: int = 0
    unanswered_s: float = 0.0
    unanswered: int = 0
    unheard: bool = False
    notified_at: float = -math.inf


@dataclass(frozen=True, slots=True)
class PulseChange:
    """A change of one tunnel's pulses: their source address, and whether the agent misses the replies."""

    name: str
    address: IPAddress
    unheard: bool


class PulseRegistry:
    """`on_change` is called while a datagram is handled: it must return at once."""

    def __init__(self, secret: bytes, on_change: Callable[[PulseChange], None] = lambda _: None) -> None:
        self._secret = secret
        self._on_change = on_change
        self._records: OrderedDict[bytes, PulseRecord] = OrderedDict()
        self._revoked_at: dict[str, float] = {}  # by name
        self._most_unheard_cached = False
        self._count_again_at = -math.inf

    def __len__(self) -> int:
        return len(self._records)

    def greet(self, name: str, key: str) -> None:
        """Answer this tunnel's pulses from now on: its agent presented `key` (of `access.Caller`)."""
        self._revoked_at.pop(name, None)
        self._add(name).greeted_key = key

    def add_known(self, seen: Mapping[str, float]) -> None:
        """Answer the pulses of tunnels in the database. `seen` is the time of each one's last report.

        Not those whose key was revoked, unless they have reported since: with another key, maybe to another replica.
        """
        for name, at in seen.items():
            if at > self._revoked_at.get(name, -math.inf) + REVOKED_KEY_MARGIN_S:
                self._revoked_at.pop(name, None)
                self._add(name)

    def forget(self, name: str, key: str, at: float) -> None:
        """Answer this tunnel's pulses no longer: `key` was revoked. No effect if it presented another key since."""
        ident = echo.ident_for(self._secret, name)
        record = self._records.get(ident)
        if record is not None and record.greeted_key not in (None, key):
            return
        self._revoked_at[name] = at
        self._records.pop(ident, None)

    def find(self, ident: bytes) -> PulseRecord | None:
        return self._records.get(ident)

    def gapless_span(self, name: str) -> tuple[float, float] | None:
        """Begin and end of the last time in which pulses of `name` came without a gap; None if none, or from a LAN."""
        record = self._records.get(echo.ident_for(self._secret, name))
        if record is None or record.address is None or not is_public(record.address):
            return None
        return record.gapless_since, record.last_at

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
        """The packed address that a datagram came from, an IPv4-mapped one as IPv4."""
        if host != record.host:
            record.host = host
            record.packed = pulse.packed(host)
        return record.packed

    def take(self, record: PulseRecord, received: pulse.Pulse, now: float) -> bool:
        """Note a genuine pulse; False for a replay or one that is too old, which changes nothing.

        While one run is active, pulses of another are answered and not used as evidence: they may be old ones that
        somebody recorded and sends from another address. A run that was replaced can come back later.
        """
        window = record.windows.pop(received.run, None) or ReplayWindow()
        taken = window.take(received.number)
        record.windows[received.run] = window
        if len(record.windows) > _MAX_RUNS:
            del record.windows[next(r for r in record.windows if r != record.run)]
        if not taken:
            return False
        if received.run != record.run:
            if now - record.last_at < _RUN_TIMEOUT_S:
                return True
            self._new_run(record, received)
        if now - record.last_at > _GAP_S:
            record.gapless_since = now
        record.unanswered_s += min(now - record.last_at, _MAX_COUNTED_GAP_S)
        record.last_at = now
        self._note_replies(record, received, now)
        self._note_address(record, now)
        return True

    def _new_run(self, record: PulseRecord, received: pulse.Pulse) -> None:
        """Start to count again: the agent was restarted, or this server was."""
        record.run = received.run
        record.heard, record.unanswered, record.unanswered_s = received.heard, 0, 0.0

    def _note_replies(self, record: PulseRecord, received: pulse.Pulse, now: float) -> None:
        if received.heard > record.heard:
            record.heard, record.unanswered, record.unanswered_s = received.heard, 0, 0.0
            if record.unheard:
                record.unheard = False
                self._notify(record, now)
            return
        record.unanswered += 1
        # An agent that never heard a reply may be behind a firewall that drops them; only one that did can lose them.
        dead = record.heard > 0 and record.unanswered >= _UNHEARD_PULSES and record.unanswered_s >= _UNHEARD_S
        if not dead or received.silent < 1000 * (_UNHEARD_S - 0.5):
            return
        record.unheard = True
        if now - record.notified_at >= _NOTIFY_INTERVAL_S and not self._most_unheard(now):
            self._notify(record, now)

    def _most_unheard(self, now: float) -> bool:
        """Whether more than half of the active agents seem to hear nothing; counted at most once a second."""
        if now >= self._count_again_at:
            recent = [
                r.unanswered >= _UNHEARD_PULSES // 2 for r in self._records.values() if now - r.last_at < _ACTIVE_S
            ]
            self._most_unheard_cached = len(recent) >= _MIN_ACTIVE_AGENTS and 2 * sum(recent) > len(recent)
            self._count_again_at = now + 1.0
        return self._most_unheard_cached

    def _note_address(self, record: PulseRecord, now: float) -> None:
        family = 4 if len(record.packed) == 4 else 6
        last = record.by_family.get(family)
        if last is not None and last.packed == record.packed:
            record.address = last
            return
        record.address = record.by_family[family] = ip_address(record.packed)
        self._notify(record, now)

    def _notify(self, record: PulseRecord, now: float) -> None:
        record.notified_at = now
        if record.address is not None:
            self._on_change(PulseChange(record.name, record.address, record.unheard))
