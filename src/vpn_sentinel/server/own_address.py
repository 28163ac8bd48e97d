"""The server's own public address, which the replaced system took for its clients' home."""

import asyncio
import logging
from ipaddress import ip_network
from typing import Final

import httpx

from vpn_sentinel.domain.policy import IPNetwork, is_public
from vpn_sentinel.wire.codec import address

log = logging.getLogger(__name__)

_INTERVAL_S: Final = 3600.0
_RETRY_S: Final = 300.0
# Bytes and seconds that an answer may take; a true one takes some 300 bytes.
MAX_ANSWER_BYTES: Final = 4096
_TIMEOUT_S: Final = 10.0


class OwnAddress:
    """Asks a trace service (`{base}/cdn-cgi/trace`, lines of `key=value`) at start and every hour.

    `wanted` says for people what does not work without the address, and what to set instead; empty where nothing does.
    """

    def __init__(self, http: httpx.AsyncClient, base: str, wanted: tuple[str, ...] = ()) -> None:
        self._http = http
        self._url = f"{base}/cdn-cgi/trace"
        self._wanted = wanted
        self._known: tuple[IPNetwork, ...] = ()
        self._failed = ""

    def __call__(self) -> tuple[IPNetwork, ...]:
        """The address as a network of one, empty while unknown."""
        return self._known

    async def run(self) -> None:
        while True:
            try:
                await self._ask()
            except (httpx.HTTPError, TimeoutError, ValueError) as e:
                self._say(type(e).__name__)
                await asyncio.sleep(_RETRY_S)
            else:
                self._failed = ""
                await asyncio.sleep(_INTERVAL_S)

    def _say(self, reason: str) -> None:
        """Once for each cause, and only what somebody may have to do something about."""
        if self._known or reason == self._failed:
            return
        self._failed = reason
        for said in self._wanted:
            log.info(said, extra={"asked": self._url, "reason": reason})

    async def _ask(self) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            text = await self._fetch()
        pairs = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        found = address(pairs.get("ip", ""))
        if not is_public(found):  # something on the way answers
            msg = f"{found} cannot be on the internet"
            raise ValueError(msg)
        self._known = (ip_network(found),)

    async def _fetch(self) -> str:
        """The answer's text. Raises httpx.HTTPError, and ValueError for what is too long, before it is all read."""
        body = b""
        # Not compressed, and raw: a few bytes must not become many.
        plain = {"Accept-Encoding": "identity"}
        async with self._http.stream("GET", self._url, headers=plain, timeout=_TIMEOUT_S) as answer:
            answer.raise_for_status()
            async for part in answer.aiter_raw():
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    msg = f"more than {MAX_ANSWER_BYTES} bytes"
                    raise ValueError(msg)
        return body.decode("utf-8", "replace")
