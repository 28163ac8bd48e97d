"""Authoritative DNS for the lab's whole tree, from the root down, with a query log that serves as an oracle.

Also the front of 1.1.1.1: it answers CH questions itself and hands everything else to a recursive resolver.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import socketserver
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from dnslib import AAAA, CLASS, EDNS0, NS, QTYPE, RCODE, RR, SOA, TXT, A, DNSHeader, DNSRecord, EDNSOption

from lab.outside.service import Service
from lab.plan import (
    AKAMAI_NS,
    CANARY_ZONE,
    CLOUDFLARE,
    CLOUDFLARE6,
    GOOGLE_NS,
    GOOGLE_NS6,
    HOSTER_NS,
    HOSTS,
    OPENDNS,
    OPENDNS6,
    ROOT_SERVER,
    SRV4,
    SRV6,
    SRV_NAME,
    TLD_SERVER,
)

# zone -> (name of its server, addresses). A zone is answered on its server's addresses only.
_ZONES: dict[str, tuple[str, tuple[str, ...]]] = {
    "": ("a.root-servers.net", (ROOT_SERVER,)),
    **dict.fromkeys(("com", "net", "org", "io", "is", "one", "test"), ("a.gtld-servers.net", (TLD_SERVER,))),
    "google.com": ("ns1.google.com", (GOOGLE_NS, GOOGLE_NS6)),
    "akamai.net": ("ns1.akamai.net", (AKAMAI_NS,)),
    "akahelp.net": ("ns1.akahelp.net", (AKAMAI_NS,)),
    "opendns.com": ("ns.opendns.com", (OPENDNS, OPENDNS6)),
    **{
        zone: (f"ns.{zone}", (HOSTER_NS,))
        for zone in (
            "ipinfo.io", "ip-api.com", "ipwho.is", "mullvad.net", "one.one", "telegram.org",
            "hooks.test", "mail.test", "sentinel.test", "probe.test", "on.quad9.net", "root-servers.net",
        )
    },
    CANARY_ZONE: (f"ns.{SRV_NAME}", (SRV4, SRV6)),
}  # fmt: skip

_ADDRESSES: dict[str, tuple[str | None, str | None]] = {
    **HOSTS,
    SRV_NAME: (SRV4, SRV6),
    f"www.{SRV_NAME}": (SRV4, SRV6),
    "resolver1.opendns.com": (OPENDNS, OPENDNS6),
    "ns1.google.com": (GOOGLE_NS, GOOGLE_NS6),
    "a.root-servers.net": (ROOT_SERVER, None),
    **{server: (addresses[0], addresses[1] if len(addresses) > 1 else None) for server, addresses in _ZONES.values()},
}

# Names under this zone all exist: a test asks for a random one and reads in the log who came for it.
_WILDCARD = "probe.test"
_WILDCARD_ADDRESSES = ("203.0.113.7", "2001:db8::7")

_TTL = 60
_ECS = 8


@dataclass
class DnsLog(Service):
    """The query log of all authoritative servers."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def queries(self) -> list[dict[str, Any]]:
        """Who asked what: time, server, client, name, type, ecs."""
        return list(self.rows)

    def forget(self) -> None:
        self.rows.clear()


class Authority:
    """Answers for every zone that lives on the address that was asked."""

    def __init__(self, log: DnsLog) -> None:
        self._log = log

    def answer(self, raw: bytes, server: str, client: str) -> bytes | None:
        try:
            query = DNSRecord.parse(raw)
        except Exception:  # noqa: BLE001 - dnslib raises many kinds; what cannot be read is not answered
            return None
        name = str(query.q.qname).rstrip(".").lower()
        kind = QTYPE.get(query.q.qtype, str(query.q.qtype))
        subnet, option = _client_subnet(query)
        row = {"time": time.time(), "server": server, "client": client, "name": name, "type": kind, "ecs": subnet}
        self._log.rows.append(row)
        reply = DNSRecord(DNSHeader(id=query.header.id, qr=1, aa=1, ra=0, rd=query.header.rd), q=query.q)
        self._fill(reply, name, kind, server, client, subnet)
        if query.ar and any(rr.rtype == QTYPE.OPT for rr in query.ar):
            reply.add_ar(EDNS0(udp_len=1232, opts=[option] if option else []))
        return bytes(reply.pack())

    def _fill(self, reply: DNSRecord, name: str, kind: str, server: str, client: str, subnet: str | None) -> None:
        here = [z for z, (_, addresses) in _ZONES.items() if server in addresses and _below(name, z)]
        if not here:
            reply.header.rcode = RCODE.REFUSED
            return
        zone = max(here, key=len)
        cuts = [z for z in _ZONES if _below(name, z) and len(z) > len(zone) and z not in here]
        if cuts:
            _refer(reply, min(cuts, key=len))
            return
        records, exists = _records(name, kind, zone, client, subnet)
        for record in records:
            reply.add_answer(record)
        if not records:
            reply.header.rcode = RCODE.NOERROR if exists else RCODE.NXDOMAIN
            soa = SOA(_ZONES[zone][0], f"hostmaster.{zone}", (1, 3600, 600, 86400, 1))
            reply.add_auth(RR(zone or ".", QTYPE.SOA, rdata=soa, ttl=1))


def _below(name: str, zone: str) -> bool:
    return zone == "" or name == zone or name.endswith(f".{zone}")


def _refer(reply: DNSRecord, zone: str) -> None:
    reply.header.aa = 0
    server, addresses = _ZONES[zone]
    reply.add_auth(RR(zone, QTYPE.NS, rdata=NS(server), ttl=_TTL))
    for address in addresses:
        reply.add_ar(_address_record(server, address))


def _address_record(name: str, address: str, ttl: int = _TTL) -> RR:
    if ":" in address:
        return RR(name, QTYPE.AAAA, rdata=AAAA(address), ttl=ttl)
    return RR(name, QTYPE.A, rdata=A(address), ttl=ttl)


def _records(name: str, kind: str, zone: str, client: str, subnet: str | None) -> tuple[list[RR], bool]:
    """The records asked for, and whether the name exists at all."""
    whoami = _whoami(name, kind, client, subnet)
    if whoami is not None:
        return whoami, True
    if name == zone and kind == "NS":
        return [RR(zone or ".", QTYPE.NS, rdata=NS(_ZONES[zone][0]), ttl=_TTL)], True
    v4, v6 = _ADDRESSES.get(name, (None, None))
    ttl = _TTL
    if zone == _WILDCARD and v4 is None:
        (v4, v6), ttl = _WILDCARD_ADDRESSES, 0
    wanted = {"A": v4, "AAAA": v6}.get(kind)
    if wanted:
        return [_address_record(name, wanted, ttl)], True
    exists = name == zone or any(_below(n, name) for n in (*_ADDRESSES, *_ZONES, *_WHOAMI))
    return [], exists


_WHOAMI = {"o-o.myaddr.l.google.com", "whoami.akamai.net", "whoami.ds.akahelp.net", "myip.opendns.com"}


def _whoami(name: str, kind: str, client: str, subnet: str | None) -> list[RR] | None:
    """Names whose answer is the asker. Never cached: a test must not wait for a TTL."""
    if name not in _WHOAMI:
        return None
    own_kind = "AAAA" if ":" in client else "A"
    match name, kind:
        case "o-o.myaddr.l.google.com", "TXT":
            texts = [client, *([f"edns0-client-subnet {subnet}"] if subnet else [])]
            return [RR(name, QTYPE.TXT, rdata=TXT(text), ttl=0) for text in texts]
        case "whoami.ds.akahelp.net", "TXT":
            pairs = [("ns", client), *([("ecs", f"{subnet}/0")] if subnet else [])]
            return [RR(name, QTYPE.TXT, rdata=TXT([key, value]), ttl=0) for key, value in pairs]
        case (("whoami.akamai.net" | "myip.opendns.com"), _) if kind == own_kind:
            return [_address_record(name, client, ttl=0)]
        case _:
            return []


def _client_subnet(query: DNSRecord) -> tuple[str | None, EDNSOption | None]:
    """The EDNS client subnet as text, and the option to echo with our scope set."""
    for rr in query.ar:
        if rr.rtype != QTYPE.OPT:
            continue
        for option in rr.rdata:
            if option.code == _ECS and len(option.data) >= 4:
                family, source, _ = struct.unpack("!HBB", option.data[:4])
                size = 4 if family == 1 else 16
                packed = option.data[4:].ljust(size, b"\0")
                text = f"{ipaddress.ip_address(packed)}/{source}"
                data = struct.pack("!HBB", family, source, source) + option.data[4:]
                return text, EDNSOption(_ECS, data)
    return None, None


class CloudflareFront:
    """1.1.1.1: answers `whoami.cloudflare` CH TXT itself; everything else goes to a recursive resolver behind it."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream

    def answer(self, raw: bytes, server: str, client: str) -> bytes | None:
        del server
        with contextlib.suppress(Exception):
            query = DNSRecord.parse(raw)
            if query.q.qclass == CLASS.CH:
                return self._chaos(query, client)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream:
            upstream.settimeout(5)
            upstream.connect(self._upstream)
            with contextlib.suppress(OSError):
                upstream.send(raw)
                return upstream.recv(65535)
        return None

    @staticmethod
    def _chaos(query: DNSRecord, client: str) -> bytes:
        texts = {"whoami.cloudflare": client, "id.server": "FRA", "version.bind": "cloudflare"}
        name = str(query.q.qname).rstrip(".").lower()
        reply = query.reply()
        if name in texts and query.q.qtype == QTYPE.TXT:
            reply.add_answer(RR(query.q.qname, QTYPE.TXT, CLASS.CH, rdata=TXT(texts[name]), ttl=0))
        else:
            reply.header.rcode = RCODE.REFUSED
        return bytes(reply.pack())


class _Tcp(socketserver.StreamRequestHandler):
    responder: Authority | CloudflareFront
    address: str

    def handle(self) -> None:
        with contextlib.suppress(OSError, struct.error):
            while header := self.rfile.read(2):
                raw = self.rfile.read(*struct.unpack("!H", header))
                reply = self.responder.answer(raw, self.address, self.client_address[0])
                if reply is None:
                    return
                self.wfile.write(struct.pack("!H", len(reply)) + reply)


class _TcpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def serve(responder: Authority | CloudflareFront, address: str) -> None:
    """Answer on one address, port 53, UDP and TCP, in threads of their own."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    udp = socket.socket(family, socket.SOCK_DGRAM)
    udp.bind((address, 53))

    def one(raw: bytes, client: Any) -> None:
        reply = responder.answer(raw, address, client[0])
        if reply is not None:
            udp.sendto(reply, client)

    def loop() -> None:
        while True:
            raw, client = udp.recvfrom(65535)
            if isinstance(responder, CloudflareFront):  # it waits for its upstream
                threading.Thread(target=one, args=(raw, client), daemon=True).start()
            else:
                one(raw, client)

    handler = type("Handler", (_Tcp,), {"responder": responder, "address": address})
    tcp_class = type("Server", (_TcpServer,), {"address_family": family})
    tcp = tcp_class((address, 53), handler)
    threading.Thread(target=loop, daemon=True).start()
    threading.Thread(target=tcp.serve_forever, kwargs={"poll_interval": 3600}, daemon=True).start()


def authoritative_addresses() -> set[str]:
    """Every address that answers for some zone (the server under test answers for its own)."""
    return {a for _, addresses in _ZONES.values() for a in addresses} - {SRV4, SRV6}


FRONT_ADDRESSES = (CLOUDFLARE, CLOUDFLARE6)
