"""qBittorrent's Web API, version 2: pause all, resume those that were running.

Version 5 of the program has the routes stop and start, version 4 pause and resume; the other version's give a 404.
"""

import logging
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlencode

from vpn_sentinel.agent.net.http import Client, HttpError, Response, json_in
from vpn_sentinel.agent.net.urls import split
from vpn_sentinel.agent.remedies.failure import RemedyError
from vpn_sentinel.agent.remedies.torrents import ANSWER_TIMEOUT_S, MAX_ANSWER_BYTES
from vpn_sentinel.runtime.secret import Secret

log = logging.getLogger(__name__)

_PAGE_SIZE: Final = 200  # torrents in one response
_MAX_PAGES: Final = 50
_MAX_HASHES: Final = 200  # in one request
# States of a torrent that does not run: version 5's, version 4's, and those after an error.
_NOT_RUNNING: Final = frozenset({"stoppedDL", "stoppedUP", "pausedDL", "pausedUP", "error", "missingFiles"})


class QBittorrent:
    """`user` may be empty where the program trusts this address (its setting for localhost)."""

    name = "qbittorrent"

    def __init__(self, http: Client, url: str, user: str, password: Secret) -> None:
        self._http = http
        self._url = url
        self._user = user
        self._password = password

    async def pause(self) -> tuple[str, ...]:
        cookie = await self._login()
        running: tuple[str, ...] = ()
        try:
            running = await self._running(cookie)
        except RemedyError as e:  # stopping matters; the list is only needed to resume
            log.warning("which torrents run could not be read; none will be resumed", extra={"reason": e})
        await self._act(cookie, ("stop", "pause"), "all")
        return running

    async def resume(self, hashes: tuple[str, ...]) -> None:
        cookie = await self._login()
        for first in range(0, len(hashes), _MAX_HASHES):
            await self._act(cookie, ("start", "resume"), "|".join(hashes[first : first + _MAX_HASHES]))

    async def _login(self) -> str:
        """The session's cookie, empty where none is needed."""
        if not self._user:
            return ""
        body = {"username": self._user, "password": self._password.reveal()}
        answer = await self._ask("POST", "/api/v2/auth/login", body, "")
        output = answer.body.strip()
        if answer.status not in (HTTPStatus.OK, HTTPStatus.NO_CONTENT) or output == b"Fails.":
            raise RemedyError("qBittorrent refuses user or password")
        return answer.headers.get("set-cookie", "").partition(";")[0]

    async def _running(self, cookie: str) -> tuple[str, ...]:
        found: list[str] = []
        for page in range(_MAX_PAGES):
            answer = await self._ask(
                "GET", f"/api/v2/torrents/info?limit={_PAGE_SIZE}&offset={page * _PAGE_SIZE}", {}, cookie
            )
            if answer.status != HTTPStatus.OK:
                raise RemedyError(_refusal(answer))
            torrents = _list_of(answer.body)
            running = (t for t in torrents if str(t.get("state")) not in _NOT_RUNNING)
            found += [t["hash"] for t in running if isinstance(t.get("hash"), str)]
            if len(torrents) < _PAGE_SIZE:
                break
        return tuple(found)

    async def _act(self, cookie: str, verbs: tuple[str, str], hashes: str) -> None:
        for verb in verbs:
            answer = await self._ask("POST", f"/api/v2/torrents/{verb}", {"hashes": hashes}, cookie)
            if answer.status in (HTTPStatus.OK, HTTPStatus.NO_CONTENT):
                return
            if answer.status != HTTPStatus.NOT_FOUND:
                break
        raise RemedyError(_refusal(answer))

    async def _ask(self, method: str, path: str, form: dict[str, str], cookie: str) -> Response:
        # qBittorrent compares these with its own address, against forged requests (CSRF).
        headers = {"Referer": self._url, "Origin": self._url} | ({"Cookie": cookie} if cookie else {})
        if form:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        try:
            return await self._http.send(
                method,
                self._url + path,
                body=urlencode(form).encode(),
                headers=headers,
                limit=ANSWER_TIMEOUT_S,
                max_bytes=MAX_ANSWER_BYTES,
            )
        except HttpError as e:
            raise RemedyError(f"qBittorrent at {split(self._url).authority}: {e}") from e


def _refusal(answer: Response) -> str:
    if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return "qBittorrent wants a login: set VPN_SENTINEL_QBITTORRENT_USER and _PASSWORD"
    return f"qBittorrent answered with status {answer.status}"


def _list_of(body: bytes) -> list[dict[str, Any]]:
    try:
        found = json_in(body)
    except ValueError as e:
        raise RemedyError("qBittorrent answered with something that is no JSON") from e
    if not isinstance(found, list) or not all(isinstance(t, dict) for t in found):
        raise RemedyError("qBittorrent answered with something that is no list of torrents")
    return found
