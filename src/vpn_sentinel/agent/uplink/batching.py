"""How many reports go into the next message: as many as the server accepts, and fewer after a failure."""

import logging
from collections.abc import Sequence
from typing import Final

from vpn_sentinel.agent.spool.spool import Spool
from vpn_sentinel.domain.observation import Observation
from vpn_sentinel.wire import codec, limits
from vpn_sentinel.wire.messages import Report

log = logging.getLogger(__name__)

MAX_CHUNK: Final = 100  # reports in one message, of the 200 that a server takes
_CHUNK_BYTES: Final = limits.MAX_BODY_BYTES * 3 // 4  # leaves room for the numbers around each observation
_MAX_ANSWER_TIMEOUT_S: Final = 24.0

_decode = codec.decoder(Observation)


class Batching:
    """Chooses the size of messages and the time to wait for an answer.

    A server that answers late gets smaller messages and more time. One that refuses a message gets fewer reports each
    time, until the refused report is alone in its message; when that is refused twice, it is dropped.
    """

    def __init__(self, spool: Spool, answer_timeout_s: float) -> None:
        self._spool = spool
        self._chunk = MAX_CHUNK
        self._min_answer_timeout_s = self.answer_timeout_s = answer_timeout_s
        self._refused_alone: int | None = None
        # The highest number that the server can know: from an earlier run, then from what this one sends.
        self.max_sent_seq = spool.last

    def reports(self, after: int) -> list[Report]:
        """The next reports to send, in order; empty when there are none."""
        rows = self._spool.take(after, self._chunk, _CHUNK_BYTES)
        found = []
        for row in rows:
            try:
                observation = _decode(row.body)
            except (ValueError, RecursionError) as e:
                # Written by another version, or damaged on the disk: it can never be sent.
                log.warning("an observation in the spool cannot be read", extra={"seq": row.seq, "reason": e})
                self._spool.give_up(row.seq)
                continue
            found.append(Report(seq=row.seq, age=self._spool.age(row), observation=observation))
            self.max_sent_seq = max(self.max_sent_seq, row.seq)
        return found

    def still_pending(self, reports: Sequence[Report]) -> int:
        """How many reports wait besides these."""
        return max(0, self._spool.pending - len(reports))

    def stored(self) -> None:
        self._chunk = min(MAX_CHUNK, self._chunk * 2)
        self.answer_timeout_s = self._min_answer_timeout_s

    def overdue(self) -> None:
        self._chunk = max(1, self._chunk // 2)
        self.answer_timeout_s = min(self.answer_timeout_s * 2, _MAX_ANSWER_TIMEOUT_S)

    def refused(self, reports: Sequence[Report], why: str) -> None:
        """Take a refusal of this message by the server itself."""
        if len(reports) > 1:
            self._chunk = max(1, len(reports) // 2)
        elif reports and self._refused_alone == reports[0].seq:
            log.error("the server refuses an observation; it is dropped", extra={"reason": why})
            self._spool.give_up(reports[0].seq)
            self._refused_alone = None
        elif reports:
            self._refused_alone = reports[0].seq
