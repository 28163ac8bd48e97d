"""Transmission's RPC: stop all, start those that were running (its docs/rpc-spec.md, in the form before 4.1, which all
versions accept).
"""

import base64
import json
import logging
from http import HTTPStatus
from typing import Any, Final

from vpn_sentinel.agent.net.http import Client, HttpError, json_in
from vpn_sentinel.agent.net.urls import split
from vpn_sentinel.agent.remedies.failure import RemedyError
from vpn_sentinel.agent.remedies.torrents import ANSWER_TIMEOUT_S, MAX_ANSWER_BYTES
from vpn_sentinel.runtime.secret import Secret

log = logging.getLogger(__name__)

_SESSION: Final = "X-Transmission-Session-Id"
_PATH: Final = "/transmission/rpc"
_STOPPED: Final = 0


class Transmission:
    """`url` may have a path; without one it gets the default path."""

    name = "transmission"

    def __init__(self, http: Client, url: str, user: str, password: Secret) -> None:
        self._http = http
        self._url = url if split(url).path not in ("", "/") else url + _PATH
        self._user = user
        self._password = password
        self._session = ""

    async def pause(self) -> tuple[str, ...]:
        running: tuple[str, ...] = ()
        try:
            running = await self._running()
        except RemedyError as e:  # stopping matters; the list is only needed to resume
            log.warning("which torrents run could not be read; none will be resumed", extra={"reason": e})
        await self._call("torrent-stop", {})
        return running

    async def resume(self, hashes: tuple[str, ...]) -> None:
        if hashes:  # without ids, all torrents would start
            await self._call("torrent-start", {"ids": list(hashes)})

    async def _running(self) -> tuple[str, ...]:
        found = await self._call("torrent-get", {"fields": ["hashString", "status"]})
        torrents = found.get("torrents")
        if not isinstance(torrents, list) or not all(isinstance(t, dict) for t in torrents):
            raise RemedyError("Transmission answered with something that is no list of torrents")
        return tuple(str(t["hashString"]) for t in torrents if t.get("status") != _STOPPED and "hashString" in t)

    async def _call(self, method: str, arguments: dict[str, object]) -> dict[str, Any]:
        """The response's arguments. An expired session id is renewed once, as the specification requires."""
        body = json.dumps({"method": method, "arguments": arguments}).encode()
        for _ in range(2):
            headers = {"Content-Type": "application/json", _SESSION: self._session}
            if self._user:
                pair = f"{self._user}:{self._password.reveal()}".encode()
                headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
            try:
                answer = await self._http.send(
                    "POST", self._url, body=body, headers=headers, limit=ANSWER_TIMEOUT_S, max_bytes=MAX_ANSWER_BYTES
                )
            except HttpError as e:
                raise RemedyError(f"Transmission at {split(self._url).authority}: {e}") from e
            if answer.status != HTTPStatus.CONFLICT:
                break
            self._session = answer.headers.get(_SESSION.lower(), "")
        if answer.status == HTTPStatus.UNAUTHORIZED:
            raise RemedyError("Transmission refuses user or password")
        if answer.status != HTTPStatus.OK:
            raise RemedyError(f"Transmission answered with status {answer.status}")
        return _arguments(answer.body)


def _arguments(body: bytes) -> dict[str, Any]:
    try:
        found = json_in(body)
    except ValueError as e:
        raise RemedyError("Transmission answered with something that is no JSON") from e
    if not isinstance(found, dict) or found.get("result") != "success":
        raise RemedyError("Transmission did not do it")
    given = found.get("arguments")
    return given if isinstance(given, dict) else {}
