"""Keeps requests to configured addresses from reaching services that only this host can reach (SSRF).

The check is made where the connection is made: the name is resolved here, each address is checked, and the connection
goes to the checked address, so an answer that changes between check and connect (DNS rebinding) has no effect. TLS
still verifies the name (`sni_hostname`), and the Host header still carries it. Connections are not kept, so each
request is checked. The client follows no redirect, and ignores the environment's proxies, since a proxy would make the
connection itself.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Final

import httpx

from vpn_sentinel.runtime.addresses import behind_nat64
from vpn_sentinel.runtime.settings import PREFIX, SettingError
from vpn_sentinel.server.notify.failures import keep_urls_out_of_the_log

# The part of IPv6 from which hosts on the internet have addresses (IANA, Internet Protocol Version 6 Address Space):
# mapped, compatible and translated IPv4, 5f00::/16, unique local, link-local and multicast are outside.
_UNICAST: Final = IPv6Network("2000::/3")
# Networks without hosts on the internet: IANA's IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890, RFC 8190),
# including the few anycast addresses of protocols in them, and multicast. `domain.policy.NOT_PUBLIC` is smaller, as
# examples and tests of leaks use the documentation networks. Not `is_global`, which differs between Python versions.
NO_HOSTS: Final = tuple(
    ip_network(block)
    for block in (
        "0.0.0.0/8",  # "this network"; Linux connects to loopback
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared address space: carriers' NAT, Tailscale, a cloud's metadata
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local; the metadata services of clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # IETF protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays, deprecated
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "2001::/23",  # IETF protocol assignments: Teredo, benchmarking, ORCHID
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
)
_MAX_ADDRESSES: Final = 4

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class ForbiddenAddressError(Exception):
    """The name has only addresses that requests may not go to."""


def is_forbidden(address: str) -> bool:
    """Whether `address`, or the IPv4 address embedded in it, is private, local, or not a host's."""
    try:
        found: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    except ValueError:
        return True
    if isinstance(found, IPv6Address):
        if (wrapped := _wrapped(found)) is not None:
            return is_forbidden(str(wrapped))
        if found not in _UNICAST:
            return True
    return any(found in block for block in NO_HOSTS)


def _wrapped(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address at which a packet to `address` would arrive (NAT64 or 6to4), None for others."""
    return behind_nat64(address) or address.sixtofour


async def resolve(host: str, port: int) -> list[str]:
    """The system resolver's answer, which also accepts unusual notations of an address. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class GuardedTransport(httpx.AsyncBaseTransport):
    """Resolves, checks, and connects to the checked address. With `private`, all are allowed: the owner wants it."""

    def __init__(self, inner: httpx.AsyncBaseTransport, *, private: bool = False, resolve: Resolve = resolve) -> None:
        self._inner = inner
        self._private = private
        self._resolve = resolve

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises ForbiddenAddressError, or what the inner transport raises."""
        url = request.url
        try:
            addresses = await self._resolve(url.host, url.port or (443 if url.scheme == "https" else 80))
        except (OSError, UnicodeError):
            addresses = None
        if addresses is None:
            msg = "the name cannot be resolved"
            raise httpx.ConnectError(msg, request=request)
        allowed = [a for a in addresses if self._private or not is_forbidden(a)][:_MAX_ADDRESSES]
        if not allowed:
            raise ForbiddenAddressError
        for address in allowed[:-1]:
            try:
                return await self._inner.handle_async_request(_pinned(request, address))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue  # the next address of the same name may answer
        return await self._inner.handle_async_request(_pinned(request, allowed[-1]))

    async def aclose(self) -> None:
        await self._inner.aclose()


def _pinned(request: httpx.Request, address: str) -> httpx.Request:
    return httpx.Request(
        method=request.method,
        url=request.url.copy_with(host=address.partition("%")[0]),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": request.url.host},
    )


def tls(ca_file: Path | None) -> ssl.SSLContext:
    """The system's certificate authorities, and those of `ca_file`. Raises SettingError."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as e:  # ssl.SSLError is one
            raise SettingError(PREFIX + "CA_FILE", f"{ca_file} holds no certificates that can be used") from e
    return context


def guarded_client(
    context: ssl.SSLContext, *, private: bool, timeout_s: float, resolve: Resolve = resolve
) -> httpx.AsyncClient:
    """A client for addresses that somebody typed in. It keeps no connection between requests, so needs no closing."""
    keep_urls_out_of_the_log()
    inner = httpx.AsyncHTTPTransport(verify=context, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
    guarded = GuardedTransport(inner, private=private, resolve=resolve)
    return httpx.AsyncClient(transport=guarded, trust_env=False, follow_redirects=False, timeout=timeout_s)
