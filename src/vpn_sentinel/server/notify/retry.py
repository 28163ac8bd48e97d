"""When to try a failed delivery again, and when to give it up. Pure; durations are in seconds."""

import random
from typing import Final

from vpn_sentinel.server.notify.channel import DeliveryError, PermanentError, SetupError, TransientError
from vpn_sentinel.server.notify.outbox import DeliveryOutcome, LeasedDelivery, Result

FIRST_WAIT_S: Final = 1.0
MAX_WAIT_S: Final = 300.0
# Bounds the wait that a receiver may ask for.
MAX_ASKED_WAIT_S: Final = 3600.0
# A receiver that is down over a long weekend must still get the leak.
KEEP_TRYING_S: Final = 7 * 86400.0
# A delivery is not given up for its age alone: after two days off, or a jump of its clock, a server still tries.
MIN_ATTEMPTS: Final = 10


def after(failure: DeliveryError, delivery: LeasedDelivery, now: float, rng: random.Random) -> DeliveryOutcome:
    """The outcome of `delivery` after `failure`.

    - PermanentError: given up at once; the next notice may be accepted.
    - SetupError: tried every five minutes for a week. The owner can repair it at any time: the worker's probes detect
      that earlier, and a restart, which some repairs need, makes everything due at once.
    - TransientError: after what the receiver asks for, else 1 s, 2 s, 4 s … 5 min, for a week.
    """
    age = now - delivery.created_at
    match failure:
        case PermanentError():
            return DeliveryOutcome(result=Result.PERMANENT, reason=failure.reason)
        case SetupError():
            result, keep, wait = Result.PERMANENT, KEEP_TRYING_S, MAX_WAIT_S * rng.uniform(0.8, 1.2)
        case TransientError(retry_after=float() | int() as asked):
            result, keep, wait = Result.TRANSIENT, KEEP_TRYING_S, min(max(float(asked), FIRST_WAIT_S), MAX_ASKED_WAIT_S)
        case _:
            # The number of attempts is in the row, so the back-off survives a restart.
            doubled = FIRST_WAIT_S * 2.0 ** min(delivery.attempt - 1, 20)
            result, keep, wait = Result.TRANSIENT, KEEP_TRYING_S, min(doubled * rng.uniform(0.5, 1.5), MAX_WAIT_S)
    if age >= keep and delivery.attempt >= MIN_ATTEMPTS:
        return DeliveryOutcome(result=result, reason=failure.reason)
    return DeliveryOutcome(result=result, reason=failure.reason, due_at=now + wait)
