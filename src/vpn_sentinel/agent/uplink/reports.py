"""The way of what was seen into the spool, and from there to the server."""

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
        self._last: object = None

    def round(self, seen: Observation, verdict: Verdict) -> None:
        """A round is over, and was judged so."""
        said = (verdict.state, tuple(f.code for f in verdict.findings), seen.exit(4), seen.exit(6))
        repeats = said == self._last and not seen.actions
        self._last = said
        self._spool.append(codec.encode(seen), routine=repeats)
        if verdict.state in (State.DOWN, State.LEAKING):
            self._uploader.hurry()
        self._uploader.wake()

    def between_rounds(self, seen: Observation) -> None:
        """Something that waits for no round. The next round is no repetition of the one before."""
        self._spool.append(codec.encode(seen), routine=False)
        self._last = None
        self._uploader.wake()
