"""The test's side of the stand-ins: speaking to them over the control socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.nodes import until

Row = dict[str, Any]


class Control:
    """One connection to the stand-ins' process."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._file = self._socket.makefile("rwb")
        self._lock = threading.Lock()

    def __call__(self, service: str, method: str, *args: Any, **kwargs: Any) -> Any:
        order = {"service": service, "call": method, "args": args, "kwargs": kwargs}
        with self._lock:
            self._file.write(json.dumps(order).encode() + b"\n")
            self._file.flush()
            answer = json.loads(self._file.readline())
        if "error" in answer:
            raise RuntimeError(f"{service}.{method}: {answer['error']}")
        return answer["ok"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Service:
    """A stand-in, by name: ipinfo, ipapi, ipwhois, mullvad, trace, telegram, webhook, mail, dns."""

    def __init__(self, control: Control, name: str) -> None:
        self._control, self.name = control, name

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._control(self.name, method, *args, **kwargs)

    def fail(self, kind: int | str, times: int | None = None, **options: Any) -> None:
        """Fail with an HTTP status, "garbage", "timeout" or "reset"; `times` times, or until healed.

        Options: retry_after=seconds; only="/sendMessage" (paths that contain it)."""
        self._call("fail", kind, times, **options)

    def heal(self) -> None:
        self._call("heal")

    def place(self, address: str, **fields: Any) -> None:
        """Claim another place for one address: country="CH", city=, region=, org=, asn=, timezone=."""
        self._call("place", address, **fields)

    def requests(self) -> list[Row]:
        """Every request so far: time, client, method, path, host."""
        return list(self._call("requests"))

    def forget(self) -> None:
        """Drop what was recorded."""
        self._call("forget")


class Telegram(Service):
    """The Bot API's stand-in."""

    def messages(self, chat_id: int | None = None) -> list[Row]:
        """Accepted messages, to all chats or to one: time (of arrival), chat_id, text, plain (without tags), ..."""
        return list(self._call("messages", chat_id))

    def calls(self) -> list[Row]:
        """Every call: time, method, parameters, status."""
        return list(self._call("calls"))

    def say(self, chat_id: int, text: str, user_id: int | None = None) -> None:
        """A user writes to the bot."""
        self._call("say", chat_id, text, user_id)

    def press(self, chat_id: int, data: str, user_id: int | None = None) -> None:
        """A user presses an inline button."""
        self._call("press", chat_id, data, user_id)

    def wait_message(self, matches: Callable[[Row], bool] = lambda _: True, timeout: float = 10, what: str = "") -> Row:
        """The first accepted message that matches."""

        def found() -> Row | None:
            return next((m for m in self.messages() if matches(m)), None)

        message = until(found, timeout, what or "a Telegram message", interval=0.02)
        assert message is not None
        return message


class Sink(Service):
    """The webhook's or the mailbox's stand-in."""

    def received(self) -> list[Row]:
        return list(self._call("received"))


class Dns(Service):
    """The authoritative servers' query log: who really asked."""

    def queries(self, name: str | None = None) -> list[Row]:
        """All queries, or those for one name: time, server, client, name, type, ecs."""
        rows = self._call("queries")
        return [row for row in rows if name is None or row["name"] == name.rstrip(".").lower()]

    def askers(self, name: str) -> set[str]:
        """The addresses that asked for a name or for something below it."""
        wanted = name.rstrip(".").lower()
        return {r["client"] for r in self.queries() if r["name"] == wanted or r["name"].endswith(f".{wanted}")}
