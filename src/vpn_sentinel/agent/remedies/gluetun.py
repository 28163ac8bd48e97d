"""Stop and start gluetun's VPN through its control server (its documentation: PUT /v1/vpn/status)."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Final

from vpn_sentinel.agent.introspect.gluetun import STATUS
from vpn_sentinel.agent.net.http import Client, HttpError
from vpn_sentinel.agent.remedies.failure import RemedyError

_RESTART_TIMEOUT_S: Final = 15.0  # it answers when OpenVPN has ended
_BETWEEN_STOP_AND_START_S: Final = 1.0


async def restart(
    http: Client,
    url: str,
    headers: Mapping[str, str],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> str:
    """Stop and start the VPN; programs in its network namespace keep that namespace. Raises RemedyError."""
    await _put(http, url, headers, "stopped")
    await sleep(_BETWEEN_STOP_AND_START_S)
    await _put(http, url, headers, "running")
    return "the VPN was stopped and started"


async def _put(http: Client, url: str, headers: Mapping[str, str], status: str) -> None:
    body = json.dumps({"status": status}).encode()
    all_headers = {"Content-Type": "application/json", **headers}
    try:
        answer = await http.send("PUT", url + STATUS, body=body, headers=all_headers, limit=_RESTART_TIMEOUT_S)
    except HttpError as e:
        raise RemedyError(f"gluetun: {e}") from e
    match answer.status:
        case HTTPStatus.OK:
            return
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
            raise RemedyError("gluetun refuses: its role needs the route PUT /v1/vpn/status")
        case other:
            raise RemedyError(f"gluetun answered with status {other}")
