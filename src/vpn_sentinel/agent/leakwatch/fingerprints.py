"""Recognize packets of VPN protocols by their content, where no endpoint of the tunnel is known.

WireGuard: section 5.4 of its paper; type, three zero bytes, and a counter whose upper bytes are zero. OpenVPN: the
opcodes of its ssl_pkt.h; a client's first packet, and data packets, which all begin with the same opcode and peer id.
IKE: RFC 7296, 3.1, the first message of an exchange; afterwards the port for NAT traversal (RFC 3948) at that host.
DTLS: RFC 6347, 4.1 and 4.2.2, a client's first message, of any version; OpenConnect begins with it.
"""

from collections import OrderedDict
from dataclasses import replace
from enum import Enum
from typing import Final

from vpn_sentinel.agent.net.endpoints import TCP, UDP, Endpoint
from vpn_sentinel.agent.net.packets import DNS_PORT, Packet
from vpn_sentinel.domain.policy import IPAddress

_WG_HANDSHAKE_BYTES: Final = {1: 148, 2: 92, 3: 64}  # size by message type
_WG_DATA_TYPE: Final = 4
_OPENVPN_RESETS: Final = (0x38, 0x50)  # P_CONTROL_HARD_RESET_CLIENT_V2 and _V3, key 0
_OPENVPN_DATA_OPCODE: Final = 9  # P_DATA_V2
_TLS_CRYPT_RESET_BYTES: Final = 54  # a reset under tls-crypt
_TLS_AUTH_RESET_BYTES: Final = frozenset(14 + 8 + mac for mac in (16, 20, 28, 32, 48, 64))
MIN_ALIKE_PACKETS: Final = 8  # OpenVPN data packets in a row with the same beginning, until they count as OpenVPN
_IKE_PORT, _IKE_NAT_PORT = 500, 4500
_MIN_TIME_S, _MAX_TIME_S = 1_577_836_800, 2_524_608_000  # Unix time: 2020 to 2050
_MAX_FLOWS: Final = 16


class Fingerprint(Enum):
    OWN = "own"  # a VPN's
    MAYBE = "maybe"  # more packets are needed
    OTHER = "other"


def is_wireguard(packet: Packet) -> bool:
    """Several packets that the kernel will segment (UDP GSO) come as one: only the header of the first counts."""
    head = packet.payload
    if packet.protocol != UDP or len(head) < 16 or head[1:4] != b"\0\0\0":
        return False
    if head[0] == _WG_DATA_TYPE:
        return packet.payload_size >= 32 and head[13:16] == b"\0\0\0"
    return _WG_HANDSHAKE_BYTES.get(head[0]) == packet.payload_size


def is_openvpn_reset(packet: Packet) -> bool:
    head, size = packet.payload, packet.payload_size
    if (
        packet.protocol != UDP
        or packet.destination_port == DNS_PORT
        or len(head) < 14
        or head[0] not in _OPENVPN_RESETS
    ):
        return False
    # Under tls-crypt the packet id, small in a reset, and the time in seconds follow opcode and session id. The upper
    # byte of the packet id says that the client supports early negotiation (ssl_pkt.h: EARLY_NEG_START).
    is_numbered = (
        head[9] in (0, 0x0F) and head[10:12] == b"\0\0" and _MIN_TIME_S <= int.from_bytes(head[13:17]) < _MAX_TIME_S
    )
    if size == _TLS_CRYPT_RESET_BYTES or (head[0] == _OPENVPN_RESETS[1] and size > _TLS_CRYPT_RESET_BYTES):
        return is_numbered
    ends_empty = head[:size][-5:] == b"\0" * 5  # no acknowledgement, message 0
    return size in (14, *_TLS_AUTH_RESET_BYTES) and ends_empty


def is_openvpn_tcp_reset(packet: Packet) -> bool:
    """The same over TCP, where two bytes with the length precede each packet (OpenVPN's socket.c)."""
    head, size = packet.payload, packet.payload_size
    if packet.protocol != TCP or len(head) < 16 or int.from_bytes(head[:2]) != size - 2:
        return False
    return is_openvpn_reset(replace(packet, protocol=UDP, payload=head[2:], payload_size=size - 2))


def is_ike_begun(packet: Packet) -> bool:
    head = packet.payload
    return (
        packet.protocol == UDP
        and packet.destination_port == _IKE_PORT
        and len(head) >= 28
        and head[:8] != b"\0" * 8
        and head[8:16] == b"\0" * 8  # the responder has chosen no SPI yet
        and head[17:20] == b"\x20\x22\x08"  # version 2, IKE_SA_INIT, from the initiator
        and int.from_bytes(head[24:28]) == packet.payload_size
    )


def is_dtls(packet: Packet) -> bool:
    head = packet.payload
    # Type handshake, version 1.0 to 1.2 (Cisco's own is 01 00), epoch 0; after the length a ClientHello.
    versions = (b"\xfe\xff", b"\xfe\xfd", b"\x01\x00")
    return (
        packet.protocol == UDP
        and len(head) > 13
        and head[0] == 22
        and head[1:3] in versions
        and head[3:5] == b"\0\0"
        and head[13] == 1
    )


class Fingerprints:
    """Classifies packets; remembers only how the last few flows began."""

    def __init__(self) -> None:
        self._began: OrderedDict[Endpoint, tuple[bytes, int]] = OrderedDict()
        self._ike: OrderedDict[IPAddress, None] = OrderedDict()

    def of(self, packet: Packet, *, openvpn: bool, unsure: bool) -> Fingerprint:
        """`openvpn`: the tunnel may be OpenVPN's. `unsure`: its packets are not known otherwise, so data packets count.

        Any program's packet may begin like an OpenVPN data packet. A reset is certain enough by itself, whatever the
        tunnel was until now: programs change their protocol while they run.
        """
        if is_wireguard(packet) or is_openvpn_tcp_reset(packet):
            return Fingerprint.OWN
        port = packet.destination_port
        if packet.protocol != UDP or port is None or port == DNS_PORT:
            return Fingerprint.OTHER
        if is_openvpn_reset(packet) or self._is_ike(packet):
            return Fingerprint.OWN
        if not (openvpn and unsure):
            return Fingerprint.OTHER
        return self._data(Endpoint(packet.destination, port, UDP), packet.payload[:4])

    def _is_ike(self, packet: Packet) -> bool:
        if is_ike_begun(packet):
            self._ike[packet.destination] = None
            if len(self._ike) > _MAX_FLOWS:
                self._ike.popitem(last=False)
            return True
        return packet.destination_port == _IKE_NAT_PORT and packet.destination in self._ike

    def _data(self, flow: Endpoint, head: bytes) -> Fingerprint:
        began, alike = self._began.get(flow, (head, 0))
        if began != head or len(head) < 4 or head[0] >> 3 != _OPENVPN_DATA_OPCODE:
            self._began.pop(flow, None)
            return Fingerprint.OTHER
        self._began[flow] = head, alike + 1
        self._began.move_to_end(flow)
        if len(self._began) > _MAX_FLOWS:
            self._began.popitem(last=False)
        return Fingerprint.OWN if alike + 1 >= MIN_ALIKE_PACKETS else Fingerprint.MAYBE
