"""A resolver that makes money from mistakes: whatever does not exist is given the address of an advertisement.

It stands before a recursive resolver: `python -m lab.outside.rewriter LISTEN PORT RESOLVER`. UDP only.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from typing import Any

from dnslib import QTYPE, RCODE, RR, A, DNSHeader, DNSRecord

ADVERTISEMENT = "203.0.113.80"


def rewrite(packed: bytes) -> bytes:
    """The resolver's answer, with an address in it when it says that there is no such name."""
    reply = DNSRecord.parse(packed)
    if reply.header.rcode != RCODE.NXDOMAIN or reply.q.qtype != QTYPE.A:
        return packed
    made = DNSRecord(DNSHeader(id=reply.header.id, qr=1, ra=1, rd=1), q=reply.q)
    made.add_answer(RR(reply.q.qname, QTYPE.A, rdata=A(ADVERTISEMENT), ttl=60))
    return bytes(made.pack())


def forward(door: socket.socket, asked: bytes, client: Any, resolver: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream, contextlib.suppress(OSError):
        upstream.settimeout(5)
        upstream.connect((resolver, 53))
        upstream.send(asked)
        door.sendto(rewrite(upstream.recv(65535)), client)


def main() -> None:
    listen, port, resolver = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
        door.bind((listen, port))
        while True:
            asked, client = door.recvfrom(65535)
            threading.Thread(target=forward, args=(door, asked, client, resolver), daemon=True).start()


if __name__ == "__main__":
    main()
