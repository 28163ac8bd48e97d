"""The Telegram Bot API, as far as a bot that watches and tells needs it."""

from __future__ import annotations

import itertools
import json
import re
import time
from html.parser import HTMLParser
from typing import Any

from lab.outside.service import Reply, Request, Service

_PATH = re.compile(r"/bot(?P<token>\d+:[\w-]+)/(?P<method>\w+)$")
_TAGS = {
    "b",
    "strong",
    "i",
    "em",
    "u",
    "ins",
    "s",
    "strike",
    "del",
    "a",
    "code",
    "pre",
    "tg-spoiler",
    "span",
    "blockquote",
}


class Telegram(Service):
    """Keeps what bots send, and lets a test speak as a user."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: list[dict[str, Any]] = []
        self._calls: list[dict[str, Any]] = []
        self._updates: list[dict[str, Any]] = []
        self._polling: set[str] = set()
        self._numbers = itertools.count(1)

    # What a test asks for.

    def messages(self, chat_id: int | None = None) -> list[dict[str, Any]]:
        """Messages that were accepted (to one chat): chat_id, text, time of arrival, and all other parameters."""
        return [m for m in self._messages if chat_id is None or int(m["chat_id"]) == chat_id]

    def calls(self) -> list[dict[str, Any]]:
        """Every call: time, method, parameters, and the status it was answered with."""
        return list(self._calls)

    def say(self, chat_id: int, text: str, user_id: int | None = None) -> int:
        """A user writes to the bot; returns the update's number."""
        return self._update("message", self._message(chat_id, text, user_id))

    def press(self, chat_id: int, data: str, user_id: int | None = None) -> int:
        """A user presses an inline button."""
        query = {
            "id": str(next(self._numbers)),
            "from": _user(user_id or chat_id),
            "chat_instance": "1",
            "data": data,
            "message": self._message(chat_id, "…", user_id),
        }
        return self._update("callback_query", query)

    def forget(self) -> None:
        super().forget()
        self._messages.clear()
        self._calls.clear()

    # What the bot sees.

    def answer(self, request: Request) -> Reply:
        match = _PATH.match(request.path)
        if match is None:
            return _error(404, "Not Found")
        try:
            parameters = request.parameters()
        except ValueError:
            return _error(400, "Bad Request: can't parse the body")
        method = match["method"]
        record = {"time": time.time(), "method": method, "parameters": parameters, "status": None}
        self._calls.append(record)
        reply = self._dispatch(method, match["token"], parameters, request)
        record["status"] = reply.status
        return reply

    def failed(self, status: int, options: dict[str, Any]) -> Reply:
        match status:
            case 429:
                wait = options.get("retry_after", 1)
                text = f"Too Many Requests: retry after {wait}"
                return _error(429, text, parameters={"retry_after": wait})
            case 401:
                return _error(401, "Unauthorized")
            case 403:
                return _error(403, "Forbidden: bot was blocked by the user")
            case _:
                return _error(status, "Internal Server Error" if status >= 500 else "Bad Request: on command")

    def _dispatch(self, method: str, token: str, parameters: dict[str, Any], request: Request) -> Reply:
        match method:
            case "getMe":
                me = {
                    "id": int(token.split(":")[0]),
                    "is_bot": True,
                    "first_name": "VPN Sentinel",
                    "username": "lab_bot",
                }
                return _ok(me)
            case "getUpdates":
                return self._get_updates(token, parameters, request)
            case "sendMessage":
                return self._send(parameters)
            case "editMessageText":
                return self._send(parameters, edited=True)
            case _:
                return _ok(result=True)

    def _send(self, parameters: dict[str, Any], *, edited: bool = False) -> Reply:
        text = str(parameters.get("text") or "")
        if not parameters.get("chat_id"):
            return _error(400, "Bad Request: chat_id is empty")
        problem = None
        if parameters.get("parse_mode", "").upper() == "HTML":
            text, problem = _plain(text)
        if problem:
            return _error(400, f"Bad Request: can't parse entities: {problem}")
        if not text.strip():
            return _error(400, "Bad Request: message text is empty")
        if len(text.encode("utf-16-le")) // 2 > 4096:
            return _error(400, "Bad Request: message is too long")
        message = self._message(_number(parameters["chat_id"]), text, None)
        message["from"] = {"id": 1, "is_bot": True, "first_name": "VPN Sentinel"}
        self._messages.append(
            {"time": time.time(), "message_id": message["message_id"], "edited": edited, "plain": text} | parameters
        )
        return _ok(message)

    def _get_updates(self, token: str, parameters: dict[str, Any], request: Request) -> Reply:
        offset, limit = int(parameters.get("offset") or 0), int(parameters.get("limit") or 100)
        allowed = parameters.get("allowed_updates")
        if isinstance(allowed, str):
            allowed = json.loads(allowed)
        end = time.monotonic() + float(parameters.get("timeout") or 0)
        with self._changed:
            if token in self._polling:
                return _error(409, "Conflict: terminated by other getUpdates request; "
                                   "make sure that only one bot instance is running")  # fmt: skip
            self._polling.add(token)
            try:
                if offset > 0:
                    self._updates = [update for update in self._updates if update["update_id"] >= offset]
                while True:
                    found = [u for u in self._updates if u["update_id"] >= offset and _is_allowed(u, allowed)]
                    left = end - time.monotonic()
                    # A bot that was killed in its long poll must not block its successor with a 409.
                    if found or left <= 0 or request.gone() or self._failure is not None:
                        return _ok(found[:limit])
                    self._changed.wait(min(left, 0.1))
            finally:
                self._polling.discard(token)

    def _message(self, chat_id: int | str, text: str, user_id: int | None) -> dict[str, Any]:
        user = _user(user_id or (chat_id if isinstance(chat_id, int) else 1))
        message = {
            "message_id": next(self._numbers),
            "from": user,
            "chat": {"id": chat_id, "type": "private" if isinstance(chat_id, int) and chat_id > 0 else "group"},
            "date": int(time.time()),
            "text": text,
        }
        if text.startswith("/"):
            message["entities"] = [{"type": "bot_command", "offset": 0, "length": len(text.split()[0])}]
        return message

    def _update(self, kind: str, content: dict[str, Any]) -> int:
        with self._changed:
            number = next(self._numbers)
            self._updates.append({"update_id": number, kind: content})
            self._changed.notify_all()
        return number


class _Entities(HTMLParser):
    """Telegram's HTML: a few tags, balanced; everything else is an error."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text: list[str] = []
        self.open: list[str] = []
        self.problem: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        if tag not in _TAGS:
            self.problem = self.problem or f'unsupported start tag "{tag}"'
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problem = self.problem or f'unexpected end tag "{tag}"'

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _plain(html: str) -> tuple[str, str | None]:
    """The text without its tags, and what is wrong with them."""
    # The parser takes "a < b" for text; Telegram does not.
    if re.search(r"<(?![a-zA-Z/])", html) or re.search(r"<[^>]*$", html):
        return html, "unsupported start tag"
    parser = _Entities()
    parser.feed(html)
    parser.close()
    if parser.open and parser.problem is None:
        parser.problem = f'can\'t find end tag corresponding to start tag "{parser.open[-1]}"'
    return "".join(parser.text), parser.problem


def _ok(result: Any) -> Reply:
    return Reply(200, {"ok": True, "result": result})


def _error(status: int, description: str, **more: Any) -> Reply:
    headers = {"Retry-After": str(more["parameters"]["retry_after"])} if "parameters" in more else {}
    return Reply(status, {"ok": False, "error_code": status, "description": description, **more}, headers)


def _is_allowed(update: dict[str, Any], allowed: list[str] | None) -> bool:
    return not allowed or any(kind in allowed for kind in update if kind != "update_id")


def _number(chat: Any) -> int | str:
    text = str(chat)
    return int(text) if text.lstrip("-").isdigit() else text


def _user(user_id: int) -> dict[str, Any]:
    return {"id": user_id, "is_bot": False, "first_name": "Ada", "username": "ada", "language_code": "en"}
