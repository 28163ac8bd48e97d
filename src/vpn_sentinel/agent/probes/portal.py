"""Is there a captive portal (situation 34)? One plain HTTP request beside the tunnel, when nothing answers through it.

Only sent where datagrams beside the tunnel are not refused: behind a kill switch it would only time out. Takes at most
1.5 s, in parallel with the reserve canaries.
"""

import asyncio
import socket
from typing import Final
from urllib.parse import urljoin, urlsplit

from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.http import Response, read_response
from vpn_sentinel.agent.net.own import OWN_SOCKETS
from vpn_sentinel.agent.probes import tag
from vpn_sentinel.agent.probes.trace import TRACE_PATH, parse_trace
from vpn_sentinel.domain.policy import IPAddress

PORTAL_TIMEOUT_S: Final = 1.5
_NETWORK_AUTHENTICATION_REQUIRED: Final = 511  # RFC 6585


async def portal(
    address: IPAddress, host: str, device: str, *, port: int = 80, limit: float = PORTAL_TIMEOUT_S
) -> bool | None:
    """Ask the trace service at `address`, whose name in URLs is `host`, bound to the interface `device`.

    True: another server answered. False: the service did. None: no answer, or one that shows neither.
    """
    try:
        async with asyncio.timeout(limit):
            return read_answer(await _get(address, host, device, port), host)
    except (TimeoutError, OSError, EOFError, ValueError, asyncio.LimitOverrunError):
        return None


async def _get(address: IPAddress, host: str, device: str, port: int) -> Response:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with AS_USER.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")
        tag.bind_marked(sock, address)
        OWN_SOCKETS.add(sock, (address, port))
        await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
        reader, writer = await asyncio.open_connection(sock=sock.dup(), limit=16 * 1024)
        try:
            name = f"[{host}]" if ":" in host else host
            writer.write(
                f"GET {TRACE_PATH} HTTP/1.1\r\nHost: {name}\r\nUser-Agent: vpn-sentinel\r\n"
                "Accept: */*\r\nConnection: close\r\n\r\n".encode("ascii")
            )
            return await read_response(reader)
        finally:
            writer.transport.abort()


def read_answer(answer: Response, host: str) -> bool | None:
    """As `portal`. Raises ValueError for a redirect to an invalid URL."""
    if answer.status in (301, 302, 303, 307, 308):
        name = f"[{host}]" if ":" in host else host
        target = urlsplit(urljoin(f"http://{name}/", answer.headers.get("location", "")))
        if target.hostname != host:
            return None if target.hostname is None else True
        return False if target.scheme == "https" else None  # the service's own redirect to HTTPS
    if answer.status == _NETWORK_AUTHENTICATION_REQUIRED:
        return True
    if answer.status == 200:
        return "ip" not in parse_trace(answer.body)
    return None
