"""Put observations into the spool, and wake the uploader."""

from vpn_sentinel.agent.spool.spool import Spool
from vpn_sentinel.agent.uplink.uploader import Uploader
from vpn_sentinel.domain.observation import Observation
from vpn_sentinel.domain.verdict import State, Verdict
from vpn_sentinel.wire import codec


class Reporter:
    """Keeps each observation and has it sent. A round that repeats the one before it may be thinned by the spool."""

    def __init__(self, spool: Spool, uploader: Uploader) -> None:
        self._spool = spool
        self._uploader = uploader
        self._last_outcome: object = None

    def round(self, seen: Observation, verdict: Verdict) -> None:
        """Keep the observation of a round that was judged."""
        outcome = (verdict.state, tuple(f.code for f in verdict.findings), seen.exit(4), seen.exit(6))
        repeats = outcome == self._last_outcome and not seen.actions
        self._last_outcome = outcome
        self._spool.append(codec.encode(seen), routine=repeats)
        if verdict.state in (State.DOWN, State.LEAKING):
            self._uploader.hurry()
        self._uploader.wake()

    def between_rounds(self, seen: Observation) -> None:
        """Keep an observation made between rounds. The next round does not count as a repetition."""
        self._spool.append(codec.encode(seen), routine=False)
        self._last_outcome = None
        self._uploader.wake()
