"""`POST /api/v1/keepalive`: for the replaced system's clients, which must work unchanged."""

import logging
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from vpn_sentinel.domain.policy import is_public
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.ingest.admission import Admission, Refusal, json_body
from vpn_sentinel.server.tracking.inputs import ReportBatch, TimedObservation
from vpn_sentinel.server.tracking.tracker import Tracker
from vpn_sentinel.wire.codec import encode
from vpn_sentinel.wire.keepalive import ParsedKeepalive, Received, read

log = logging.getLogger(__name__)

_MAX_LOGGED_FIELDS: Final = 1000  # pairs of client and field that are remembered as logged


class Keepalives:
    """Caller: any key; a tunnel's own token only for its own `client_id`."""

    def __init__(self, admission: Admission, tracker: Tracker, clock: Clock, silent_after: float) -> None:
        self._admission = admission
        self._tracker = tracker
        self._clock = clock
        self._silent_after = silent_after
        self._logged: set[tuple[str, str]] = set()

    async def take(self, scope: Any, receive: Any) -> bytes:
        """Store one keepalive and return the answer's body. Raises Refusal."""
        peer = await self._admission.admit(scope)
        if peer.address is not None:
            self._admission.rate_limit(peer.client(""))
        body = await json_body(receive, peer.headers)
        now = self._clock.wall()
        try:
            keepalive = read(body, now, peer.address if peer.address and is_public(peer.address) else None)
        except msgspec.ValidationError as e:
            # The replaced server answered 400 to a report without a name, and its clients expect that.
            raise Refusal(400 if "missing required field `client_id`" in str(e) else 422, str(e)) from e
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
            raise Refusal(400, f"the body is not JSON: {e}") from e
        except ValueError as e:
            raise Refusal(422, str(e)) from e
        if not peer.caller.may_report_as(keepalive.client_id):
            raise Refusal(403, f"this token may only report as {peer.caller.name}")
        self._log_unreadable(keepalive)
        if peer.address is None:
            self._admission.rate_limit(peer.client(keepalive.client_id))
        await self._tracker.submit(
            ReportBatch(
                tunnel=keepalive.client_id,
                received_at=now,
                observations=(TimedObservation(seq=0, at=now, observation=keepalive.observation),),
                silent_after=self._silent_after,
                interval=0.0,  # a keepalive promises none
                version=keepalive.version,
                skew=keepalive.skew,
                dns_loc=keepalive.dns_loc,
                dns_colo=keepalive.dns_colo,
            )
        )
        return encode(Received(server_time=datetime.fromtimestamp(now, UTC).isoformat()))

    def _log_unreadable(self, keepalive: ParsedKeepalive) -> None:
        """Log a field that cannot be read, once, with its value: the report is taken without it."""
        for field, value in keepalive.odd:
            if (keepalive.client_id, field) not in self._logged and len(self._logged) < _MAX_LOGGED_FIELDS:
                self._logged.add((keepalive.client_id, field))
                known = {"tunnel": keepalive.client_id, "field": field, "value": value}
                log.warning("an old client's field is not understood, and counts as missing", extra=known)
