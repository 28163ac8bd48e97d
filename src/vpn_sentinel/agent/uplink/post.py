"""Reports by POST, for networks whose proxies let no WebSocket through."""

from http import HTTPStatus

from vpn_sentinel.agent.http import Client, HttpError
from vpn_sentinel.agent.uplink.answers import own_refusal, plain, strangers
from vpn_sentinel.agent.uplink.channel import ChannelError, Fault
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.secret import Secret


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
            answer = plain(response.headers, response.body)
        except ValueError as e:
            raise ChannelError(Fault.BROKEN, str(e)) from e
        if not answer.lstrip().startswith(b"{"):
            raise ChannelError(Fault.BROKEN, strangers(status))
        return answer
    why = own_refusal(status, response.headers, response.body)
    if why is None:
        fault = Fault.CUT if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE else Fault.BROKEN
        raise ChannelError(fault, strangers(status))
    match status:
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
            raise ChannelError(Fault.DENIED, f"the server refuses: {why} (HTTP {status})")
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE | HTTPStatus.UNPROCESSABLE_ENTITY:
            raise ChannelError(Fault.REJECTED, f"the server does not take this report: {why} (HTTP {status})")
        case _:  # 400 too: what is no JSON there was JSON here, and was changed on the way
            raise ChannelError(Fault.BROKEN, f"the server refuses: {why} (HTTP {status})")
