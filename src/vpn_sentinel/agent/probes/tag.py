"""The mark that distinguishes a probe of ours from the same query by another program, for the leak watch.

Two agents, or an agent and `check`, may share a network namespace: each sees the other's probes leave beside the
tunnel, where they are sent on purpose. A mark on the socket (SO_MARK) could change the route, so the packet itself is
marked:

- a DNS query has a TTL of 65, which no system uses as its initial value, and its 16-bit id is a keyed hash of source
  port and name. No ordinary program has both by chance;
- a TCP connection beside the tunnel has a TTL of 65 and a source port that is marked by a keyed hash of port and remote
  address, as one in 256 is;
- a request to the server's echo, and a pulse, has a keyed hash of its nonce in its spare bytes.

The key is the kernel's boot id (random(4)): all programs on this machine read the same value, and others do not know
it, so the DNS id is as hard to guess from outside as a random one. Where it cannot be read there is no mark.
"""

import errno
import random
import socket
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import blake2s
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.net.endpoints import TCP, UDP
from vpn_sentinel.agent.net.packets import Packet, asked_name
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.wire.echo import MAGIC, NONCE_OFFSET, TAG_BYTES, TAG_OFFSET

PROBE_HOPS: Final = 65
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NONCE_BYTES: Final = 8
_EPHEMERAL_PORTS: Final = range(32768, 60999)  # ip(7), ip_local_port_range


@cache
def _key() -> bytes | None:
    try:
        return blake2s(_BOOT_ID.read_bytes(), person=b"vs-probe").digest()
    except OSError:
        return None


def dns_question(message: bytes, port: int) -> bytes:
    """The DNS query `message` with the id that marks it when it is sent from `port`; other messages unchanged."""
    name, key = asked_name(message), _key()
    if message.startswith(MAGIC) or name is None or key is None:
        return message
    return _dns_id(key, port, name) + message[2:]


def unmarked(answer: bytes, asked: bytes, message: bytes) -> bytes:
    """The answer to `asked` with the id of `message`, from which `dns_question` made it; unchanged for another id."""
    return message[:2] + answer[2:] if asked is not message and answer[:2] == asked[:2] else answer


def of_echo(nonce: bytes) -> bytes:
    """The mark in the spare bytes of an echo request: 8 bytes, or none without a key."""
    key = _key()
    return b"" if key is None else blake2s(nonce, key=key, digest_size=TAG_BYTES).digest()


def is_probe(packet: Packet, ports: Iterable[int] = ()) -> bool:
    """Whether the packet carries the mark of a probe from this machine.

    `ports` are other source ports that a DNS query may have had: NAT on this host may have changed it.
    """
    key, payload = _key(), packet.payload
    if key is None or packet.source_port is None:
        return False
    if packet.protocol == TCP:
        return packet.ttl == PROBE_HOPS and _is_marked(key, packet.source_port, packet.destination)
    if packet.protocol != UDP:
        return False
    if payload.startswith(MAGIC):
        nonce = payload[NONCE_OFFSET : NONCE_OFFSET + _NONCE_BYTES]
        return len(payload) >= TAG_OFFSET + TAG_BYTES and payload[TAG_OFFSET : TAG_OFFSET + TAG_BYTES] == of_echo(nonce)
    name = asked_name(payload) if packet.ttl == PROBE_HOPS else None
    return name is not None and any(payload[:2] == _dns_id(key, p, name) for p in (packet.source_port, *ports))


def tcp_ports(to: IPAddress) -> Iterator[int]:
    """Local ports that mark a connection to `to`; then 0 (any port), also without a key."""
    key = _key()
    first = random.choice(_EPHEMERAL_PORTS)  # noqa: S311 - no secret
    for n in range(len(_EPHEMERAL_PORTS)):
        port = _EPHEMERAL_PORTS[(first - _EPHEMERAL_PORTS.start + n) % len(_EPHEMERAL_PORTS)]
        if key is not None and _is_marked(key, port, to):
            yield port
    yield 0


def bind_marked(sock: socket.socket, to: IPAddress) -> None:
    """Give a TCP socket the mark of a probe before it connects to `to`. Raises OSError."""
    if to.version == 4:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, PROBE_HOPS)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, PROBE_HOPS)
    for port in tcp_ports(to):
        try:
            sock.bind(("", port))
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                raise
            continue
        return


def _is_marked(key: bytes, port: int, to: IPAddress) -> bool:
    return blake2s(port.to_bytes(2) + to.packed, key=key, digest_size=1).digest() == b"\0"


def _dns_id(key: bytes, port: int, name: str) -> bytes:
    return blake2s(port.to_bytes(2) + name.lower().encode(), key=key, digest_size=2).digest()
