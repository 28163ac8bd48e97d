"""Can a TCP connection be established, and by which path? A SYN and its answer; then the connection is reset.

A kill switch may block only datagrams, or everything except a TCP port: the result for one says nothing about the
other.
"""

import asyncio
import socket
from typing import Final

from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.interfaces import Paths
from vpn_sentinel.agent.net.own import OWN_SOCKETS
from vpn_sentinel.agent.probes import tag
from vpn_sentinel.agent.probes.targets import CLOUDFLARE
from vpn_sentinel.domain.observation import Answer, Canary, Path, Probe
from vpn_sentinel.domain.policy import IPAddress

# A rule that drops the SYN gives no error, so behind most kill switches the whole time passes; an answer takes one
# round trip.
CONNECT_TIMEOUT_S: Final = 0.3
_HTTPS_PORT: Final = 443
TARGET: Final = "cloudflare_tcp"


async def opens(address: IPAddress, port: int, *, device: str | None = None, limit: float = CONNECT_TIMEOUT_S) -> bool:
    """Whether a connection to `port` of `address` is accepted within `limit` seconds, sent by `device` if given."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with AS_USER.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            if device is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")
            tag.bind_marked(sock, address)
            # SO_LINGER 0: close() sends a reset, so no state is left at either end.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            OWN_SOCKETS.add(sock, (address, port))
            async with asyncio.timeout(limit):
                await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except OSError:  # TimeoutError is one
        return False
    return True


async def beside(paths: Paths, found: tuple[Canary, ...], *, max_uplinks: int) -> tuple[Canary, ...]:
    """C2 by TCP, by each of the first `max_uplinks` where no datagram was answered; returns the answers."""
    open_ = {(c.interface, c.family) for c in found if c.probe is Probe.PHYSICAL and c.answer is Answer.ANSWERED}
    wanted = [
        (uplink, target.address)
        for uplink in paths.survey.uplinks[:max_uplinks]
        for target in CLOUDFLARE
        if (uplink.name, target.address.version) not in open_ and paths.can_route(uplink, target.address)
    ]
    answered = await asyncio.gather(*(opens(address, _HTTPS_PORT, device=uplink.name) for uplink, address in wanted))
    return tuple(
        Canary(
            probe=Probe.PHYSICAL,
            target=TARGET,
            family=address.version,
            answer=Answer.ANSWERED,
            path=Path.OUTSIDE,
            interface=uplink.name,
        )
        for (uplink, address), accepted in zip(wanted, answered, strict=True)
        if accepted
    )
