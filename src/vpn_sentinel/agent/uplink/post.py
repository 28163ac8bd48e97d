"""Send reports by POST, for networks whose proxies let no WebSocket through."""

from http import HTTPStatus

from vpn_sentinel.agent.net.http import Client, HttpError
from vpn_sentinel.agent.uplink.answers import decompressed, foreign_answer, own_refusal
from vpn_sentinel.agent.uplink.channel import ALTERED, ChannelError, Fault
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.wire import limits
from vpn_sentinel.wire.messages import REFUSED_HEADER, fingerprint


async def post(http: Client, url: str, at: IPAddress, key: Secret, body: bytes, *, limit: float) -> bytes:
    """Send one `Exchange` and return the answer's body. Raises ChannelError."""
    headers = {"X-API-Key": key.reveal(), "Content-Type": "application/json"}
    try:
        response = await http.post(url, body, headers, limit=limit, at=at)
    except HttpError as e:
        raise ChannelError(Fault.BROKEN, str(e)) from e
    status = response.status
    if status == HTTPStatus.OK:
        try:
            answer = decompressed(response.headers, response.body)
        except ValueError as e:
            raise ChannelError(Fault.BROKEN, str(e)) from e
        if not answer.lstrip().startswith(b"{"):
            raise ChannelError(Fault.BROKEN, foreign_answer(status))
        return answer
    why = own_refusal(status, response.headers, response.body)
    if why is None:
        fault = Fault.CUT if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE else Fault.BROKEN
        raise ChannelError(fault, foreign_answer(status))
    of = response.headers.get(REFUSED_HEADER)
    if of not in (None, fingerprint(body)):
        raise ChannelError(Fault.BROKEN, ALTERED)
    raise ChannelError(_fault(status, body, proved=of is not None), f"the server refuses: {why} (HTTP {status})")


def _fault(status: int, body: bytes, *, proved: bool) -> Fault:
    """The fault of a refusal by the server; `proved`: the refusal is about the reports in `body` as they were sent."""
    if proved:
        return Fault.REJECTED
    match status:
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:  # the server did not read the body, so it gives no fingerprint
            return Fault.REJECTED if len(body) > limits.MAX_BODY_BYTES else Fault.CUT
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN | HTTPStatus.UNPROCESSABLE_ENTITY:
            return Fault.DENIED  # the key, or the greeting
        case _:
            return Fault.BROKEN
