"""The mark that tells a probe of ours from the same question asked by any other program, for a leak watch to read.

Two agents, or an agent and `check`, may share a network namespace: each sees the other's probes leave beside the
tunnel, where they are sent on purpose. A mark on the socket (SO_MARK) would change the route, so the packet has one:

- a DNS question leaves with 65 hops, which no system begins with, and its 16-bit id is a keyed hash of source port and
  name. Both together an ordinary program has by chance never, since nothing else sends with 65 hops;
- a TCP connection beside the tunnel is begun with 65 hops from a port of which one in 256 is marked, by a keyed hash of
  port and far address;
- a question to the server's echo, and a pulse, carries in its spare bytes a keyed hash of its nonce.

The key is the kernel's boot id (random(4)): all programs on this machine read the same, and nobody else can know it, so
the id stays as hard to guess from outside as a random one. Where it cannot be read there is no mark.
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
from vpn_sentinel.wire.echo import MAGIC, NONCE_AT, TAG, TAG_AT

PROBE_HOPS: Final = 65
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NONCE: Final = 8
_PORTS: Final = range(32768, 60999)  # ip(7), ip_local_port_range


@cache
def _key() -> bytes | None:
    try:
        return blake2s(_BOOT_ID.read_bytes(), person=b"vs-probe").digest()
    except OSError:
        return None


def dns_question(message: bytes, port: int) -> bytes:
    """The DNS question `message` with the id that marks it when it is sent from `port`; anything else as it is."""
    name, key = asked_name(message), _key()
    if message.startswith(MAGIC) or name is None or key is None:
        return message
    return _ident(key, port, name) + message[2:]


def unmarked(answer: bytes, asked: bytes, message: bytes) -> bytes:
    """The answer to `asked` as one to `message`, which `dns_question` made it of; as it is when its id is another."""
    return message[:2] + answer[2:] if asked is not message and answer[:2] == asked[:2] else answer


def of_echo(nonce: bytes) -> bytes:
    """What the spare bytes of an echo's question carry: 8 bytes, or none where there is no key."""
    key = _key()
    return b"" if key is None else blake2s(nonce, key=key, digest_size=TAG).digest()


def is_probe(packet: Packet, ports: Iterable[int] = ()) -> bool:
    """Whether the packet carries the mark of a probe from this machine.

    `ports` are others that a DNS question may have been sent from: this host's NAT may have given it another one.
    """
    key, payload = _key(), packet.payload
    if key is None or packet.source_port is None:
        return False
    if packet.protocol == TCP:
        return packet.hops == PROBE_HOPS and _is_marked(key, packet.source_port, packet.destination)
    if packet.protocol != UDP:
        return False
    if payload.startswith(MAGIC):
        nonce = payload[NONCE_AT : NONCE_AT + _NONCE]
        return len(payload) >= TAG_AT + TAG and payload[TAG_AT : TAG_AT + TAG] == of_echo(nonce)
    name = asked_name(payload) if packet.hops == PROBE_HOPS else None
    return name is not None and any(payload[:2] == _ident(key, p, name) for p in (packet.source_port, *ports))


def tcp_ports(to: IPAddress) -> Iterator[int]:
    """Ports of ours that mark a connection to `to`; 0, any port, where there is no key."""
    key = _key()
    first = random.choice(_PORTS)  # noqa: S311 - no secret
    for n in range(len(_PORTS)):
        port = _PORTS[(first - _PORTS.start + n) % len(_PORTS)]
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


def _ident(key: bytes, port: int, name: str) -> bytes:
    return blake2s(port.to_bytes(2) + name.lower().encode(), key=key, digest_size=2).digest()
