"""Reports by POST, for networks whose proxies let no WebSocket through."""

from http import HTTPStatus

from vpn_sentinel.agent.http import Client, HttpError
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
    match response.status:
        case HTTPStatus.OK:
            return response.body
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
            raise ChannelError(Fault.DENIED, f"the server does not accept this key (HTTP {response.status})")
        case HTTPStatus.BAD_REQUEST | HTTPStatus.REQUEST_ENTITY_TOO_LARGE | HTTPStatus.UNPROCESSABLE_ENTITY:
            raise ChannelError(Fault.REJECTED, f"the server does not take this report (HTTP {response.status})")
        case status:
            raise ChannelError(Fault.BROKEN, f"HTTP {status}")
