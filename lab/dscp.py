"""Routing rules by DSCP (RFC 2474), which Linux knows since 6.12: by rtnetlink, since iproute2 has no word before 6.14.

`python lab/dscp.py PREF DSCP TABLE` adds an IPv4 rule in this namespace, and ends with 3 where the kernel knows none.
It imports nothing of the lab: what it takes to start counts in the measured situations.
Sources: linux/fib_rules.h, linux/rtnetlink.h, rtnetlink(7).
"""

from __future__ import annotations

import functools
import os
import socket
import struct
import subprocess
import sys

SCRIPT = __file__
_NEWRULE = 32
_REQUEST_ACK_ECHO_EXCL_CREATE = 0x1 | 0x4 | 0x8 | 0x200 | 0x400
_PRIORITY, _TABLE, _DSCP = 6, 15, 25  # FRA_*
_HEADER, _FIXED = struct.Struct("=IHHII"), struct.Struct("=8BI")
_UNKNOWN = 3


@functools.cache
def known() -> bool:
    """Whether this kernel has rules by DSCP: one is tried in a namespace of its own."""
    command = ["unshare", "--net", sys.executable, "-S", SCRIPT, "1", "46", "254"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, _UNKNOWN):
        raise RuntimeError(f"a rule by DSCP could not be tried: {done.stderr}")
    return done.returncode == 0


def add(pref: int, dscp: int, table: int) -> bool:
    """Add the rule. False, and no rule, where the kernel knows none of the kind. Raises OSError."""
    asked = ((_PRIORITY, struct.pack("=I", pref)), (_DSCP, bytes([dscp])), (_TABLE, struct.pack("=I", table)))
    body = _FIXED.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 1, 0) + b"".join(_attribute(k, v) for k, v in asked)
    header = _HEADER.pack(_HEADER.size + len(body), _NEWRULE, _REQUEST_ACK_ECHO_EXCL_CREATE, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.send(header + body)
        said = kernel.recv(8192)
    length, kind, *_ = _HEADER.unpack_from(said)
    if kind != _NEWRULE:
        (code,) = struct.unpack_from("=i", said, _HEADER.size)
        raise OSError(-code, os.strerror(-code))
    # An older kernel passes over what it does not know: then the rule would lead everything there.
    if _has(said[_HEADER.size + _FIXED.size : length], _DSCP):
        return True
    subprocess.run(["ip", "rule", "del", "pref", str(pref)], check=True)
    return False


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _has(attributes: bytes, wanted: int) -> bool:
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind == wanted:
            return True
        attributes = attributes[(length + 3) & ~3 :]
    return False


if __name__ == "__main__":
    sys.exit(0 if add(*map(int, sys.argv[1:])) else _UNKNOWN)
