"""The server's own public address, which the replaced system used as its clients' home."""

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
# A genuine answer has about 300 bytes.
MAX_ANSWER_BYTES: Final = 4096
_TIMEOUT_S: Final = 10.0


class OwnAddress:
    """Asks a trace service (`{base}/cdn-cgi/trace`, lines of `key=value`) at the start and every hour.

    `advice` are sentences for the log: what does not work without the address, and what to set instead.
    """

    def __init__(self, http: httpx.AsyncClient, base: str, advice: tuple[str, ...] = ()) -> None:
        self._http = http
        self._url = f"{base}/cdn-cgi/trace"
        self._advice = advice
        self._known: tuple[IPNetwork, ...] = ()
        self._last_failure = ""

    def __call__(self) -> tuple[IPNetwork, ...]:
        """The address as a network of one address, empty while unknown."""
        return self._known

    async def run(self) -> None:
        while True:
            try:
                await self._ask()
            except (httpx.HTTPError, TimeoutError, ValueError) as e:
                self._log_failure(type(e).__name__)
                await asyncio.sleep(_RETRY_S)
            else:
                self._last_failure = ""
                await asyncio.sleep(_INTERVAL_S)

    def _log_failure(self, reason: str) -> None:
        """Log a failure once for each cause, and only where people may have to do something about it."""
        if self._known or reason == self._last_failure:
            return
        self._last_failure = reason
        for sentence in self._advice:
            log.info(sentence, extra={"asked": self._url, "reason": reason})

    async def _ask(self) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            text = await self._fetch()
        pairs = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        found = address(pairs.get("ip", ""))
        if not is_public(found):  # something between us and the service answers
            msg = f"{found} cannot be on the internet"
            raise ValueError(msg)
        self._known = (ip_network(found),)

    async def _fetch(self) -> str:
        """The answer's text. Raises httpx.HTTPError, and ValueError for a too long one before all of it is read."""
        body = b""
        # Uncompressed, so that a few bytes cannot expand to many.
        plain = {"Accept-Encoding": "identity"}
        async with self._http.stream("GET", self._url, headers=plain, timeout=_TIMEOUT_S) as answer:
            answer.raise_for_status()
            async for part in answer.aiter_raw():
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    msg = f"more than {MAX_ANSWER_BYTES} bytes"
                    raise ValueError(msg)
        return body.decode("utf-8", "replace")
