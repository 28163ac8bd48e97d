"""What goes into the next message: as much of the spool as the server can take, and less of it after a failure."""

import logging
from collections.abc import Sequence
from typing import Final

from vpn_sentinel.agent.spool.spool import Spool
from vpn_sentinel.domain.observation import Observation
from vpn_sentinel.wire import codec, limits
from vpn_sentinel.wire.messages import Report

log = logging.getLogger(__name__)

MAX_REPORTS: Final = 100  # reports in one message
_CHUNK_BYTES: Final = limits.MAX_BODY_BYTES * 3 // 4  # leaves room for the numbers around each observation
_LONGEST_PATIENCE: Final = 24.0

_decode = codec.decoder(Observation)


class Batching:
    """Sizes messages and knows how long to wait for an answer.

    A server that answers late gets smaller messages and more time; one that refuses a message gets ever fewer reports,
    until the one that it will not take is alone and, refused again, is given up.
    """

    def __init__(self, spool: Spool, patience: float) -> None:
        self._spool = spool
        self._chunk = MAX_REPORTS
        self._least_patience = self.patience = patience
        self._refused_alone: int | None = None
        # The highest number that the server can know: what a run before this one left, then what this one sends.
        self.sent_upto = spool.last

    def reports(self, after: int) -> list[Report]:
        """The next ones, in order, to be sent now; empty when there are none."""
        rows = self._spool.take(after, self._chunk, _CHUNK_BYTES)
        found = []
        for row in rows:
            try:
                observation = _decode(row.body)
            except (ValueError, RecursionError) as e:
                # Written by another version, or by a disk that lies: it can never be sent.
                log.warning("an observation in the spool cannot be read", extra={"seq": row.seq, "reason": e})
                self._spool.give_up(row.seq)
                continue
            found.append(Report(seq=row.seq, age=self._spool.age(row), observation=observation))
            self.sent_upto = max(self.sent_upto, row.seq)
        return found

    def left_behind(self, reports: Sequence[Report]) -> int:
        """How many wait beside these."""
        return max(0, self._spool.pending - len(reports))

    def stored(self) -> None:
        self._chunk = min(MAX_REPORTS, self._chunk * 2)
        self.patience = self._least_patience

    def overdue(self) -> None:
        self._chunk = max(1, self._chunk // 2)
        self.patience = min(self.patience * 2, _LONGEST_PATIENCE)

    def refused(self, reports: Sequence[Report], why: str) -> None:
        """The server will not take this message, whatever way it comes."""
        if len(reports) > 1:
            self._chunk = max(1, len(reports) // 2)
        elif reports and self._refused_alone == reports[0].seq:
            log.error("the server does not take an observation; it is given up", extra={"reason": why})
            self._spool.give_up(reports[0].seq)
            self._refused_alone = None
        elif reports:
            self._refused_alone = reports[0].seq
