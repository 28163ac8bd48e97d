"""Targets that answer one datagram with the sender's address as they see it."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import Final, Protocol

from vpn_sentinel.agent.net.urls import address_in
from vpn_sentinel.agent.probes import dnswire, tag
from vpn_sentinel.domain.policy import IPAddress, is_public
from vpn_sentinel.wire import echo


@dataclass(frozen=True, slots=True)
class EchoAnswer:
    """An answer. `address` is None when it has none: then something other than the target answered."""

    address: IPAddress | None


class Target(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def address(self) -> IPAddress: ...
    @property
    def port(self) -> int: ...

    def question(self) -> tuple[bytes, Callable[[bytes], EchoAnswer | None]]:
        """A datagram, and a parser for its answer that returns None for any other datagram."""
        ...


@dataclass(frozen=True, slots=True)
class ServerEcho:
    """The project's own server: wire.echo."""

    address: IPAddress
    port: int
    ident: bytes
    key: bytes
    name: str = "echo"

    def question(self) -> tuple[bytes, Callable[[bytes], EchoAnswer | None]]:
        nonce = secrets.token_bytes(8)
        return echo.request(self.ident, nonce, self.key, tag.of_echo(nonce)), partial(self._read, nonce)

    def _read(self, nonce: bytes, datagram: bytes) -> EchoAnswer | None:
        address = echo.read_reply(datagram, self.ident, nonce, self.key)
        return None if address is None else EchoAnswer(address)


@dataclass(frozen=True, slots=True)
class DnsWhoami:
    """A name server that answers with the client's address."""

    name: str
    address: IPAddress
    domain: str
    kind: int
    klass: int
    port: int = 53

    def question(self) -> tuple[bytes, Callable[[bytes], EchoAnswer | None]]:
        asked = dnswire.query(secrets.randbits(16), self.domain, self.kind, self.klass)
        return asked, partial(self._read, asked)

    def _read(self, asked: bytes, datagram: bytes) -> EchoAnswer | None:
        try:
            reply = dnswire.parse(datagram, asked)
        except dnswire.BadMessageError:
            return None
        return EchoAnswer(self._address(reply))

    def _address(self, reply: dnswire.DnsReply) -> IPAddress | None:
        """Public, and of the family of the query: a captive portal's resolver answers with its own address."""
        found = [*reply.addresses, *(a for strings in reply.texts for s in strings if (a := address_in(s)))]
        return next((a for a in found if a.version == self.address.version and is_public(a)), None)


def cloudflare(port: int = 53) -> tuple[DnsWhoami, ...]:
    """CH TXT whoami.cloudflare at both families' literal addresses: no name must be resolved."""
    return tuple(
        DnsWhoami("cloudflare", ip_address(a), "whoami.cloudflare", dnswire.TXT, dnswire.CHAOS, port)
        for a in ("1.1.1.1", "2606:4700:4700::1111")
    )


def opendns(port: int = 53) -> tuple[DnsWhoami, ...]:
    """myip.opendns.com at resolver1.opendns.com's addresses."""
    return tuple(
        DnsWhoami("opendns", ip_address(a), "myip.opendns.com", kind, dnswire.IN, port)
        for a, kind in (("208.67.222.222", dnswire.A), ("2620:119:35::35", dnswire.AAAA))
    )


CLOUDFLARE: Final = cloudflare()
OPENDNS: Final = opendns()
# TEST-NET-1 (RFC 5737): no DNS server is there, so an answer shows that something diverts queries to those above too.
NO_DNS: Final = DnsWhoami("no_dns", ip_address("192.0.2.53"), "a.root-servers.net", dnswire.A, dnswire.IN)
