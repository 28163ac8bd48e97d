"""Packets as bytes, and a machine that runs a filter on them as linux/net/core/filter.c would."""

import struct
from collections.abc import Sequence
from ipaddress import ip_address

from vpn_sentinel.agent.leakwatch.bpf import Insn

OUTGOING, HOST = 4, 0


def udp(source_port: int, port: int, payload: bytes = b"") -> bytes:
    return struct.pack("!HHHH", source_port, port, 8 + len(payload), 0) + payload


def tcp(source_port: int, port: int, flags: int = 0x10, payload: bytes = b"") -> bytes:
    return struct.pack("!HHIIBBHHH", source_port, port, 1, 1, 0x50, flags, 64, 0, 0) + payload


def ip(source: str, destination: str, protocol: int, rest: bytes, *, offset: int = 0) -> tuple[int, bytes]:
    """(ethertype, packet). `offset` makes it a later fragment."""
    a, b = ip_address(source), ip_address(destination)
    if a.version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(rest), 1, offset, 64, protocol, 0)
        return 0x0800, head + a.packed + b.packed + rest
    if offset:
        rest, protocol = struct.pack("!BBHI", protocol, 0, offset << 3, 1) + rest, 44
    return 0x86DD, struct.pack("!IHBB", 6 << 28, len(rest), protocol, 64) + a.packed + b.packed + rest


def query(name: str, ident: int = 0x1234) -> bytes:
    labels = b"".join(bytes([len(p)]) + p.encode() for p in name.split("."))
    return struct.pack("!6H", ident, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def run(made: Sequence[Insn], data: bytes, *, protocol: int, kind: int = OUTGOING, mark: int = 0) -> int:  # noqa: C901 - one case an instruction
    """How many bytes the filter lets up. An instruction it does not know is an error of the test."""
    ancillary = {0xFFFFF000: protocol, 0xFFFFF004: kind, 0xFFFFF014: mark}
    a = x = at = 0
    memory: dict[int, int] = {}

    def load(offset: int, size: int) -> int | None:
        if offset in ancillary:
            return ancillary[offset]
        return int.from_bytes(data[offset : offset + size], "big") if offset + size <= len(data) else None

    while True:
        i = made[at]
        at += 1
        match i.code:
            case 0x80:
                a = len(data)
            case 0x20 | 0x28 | 0x30 | 0x48 | 0x50:
                size = {0x20: 4, 0x28: 2, 0x30: 1, 0x48: 2, 0x50: 1}[i.code]
                got = load(i.k + (x if i.code in (0x48, 0x50) else 0), size)
                if got is None:
                    return 0
                a = got
            case 0xB1:
                got = load(i.k, 1)
                if got is None:
                    return 0
                x = (got & 0xF) * 4
            case 0x01:
                x = i.k
            case 0x02:
                memory[i.k] = a
            case 0x03:
                memory[i.k] = x
            case 0x60:
                a = memory[i.k]
            case 0x61:
                x = memory[i.k]
            case 0x54:
                a &= i.k
            case 0x05:
                at += i.k
            case 0x15:
                at += i.true if a == i.k else i.false
            case 0x25:
                at += i.true if a > i.k else i.false
            case 0x45:
                at += i.true if a & i.k else i.false
            case 0x06:
                return i.k
            case _:
                raise AssertionError(i)
