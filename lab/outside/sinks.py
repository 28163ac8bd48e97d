"""Sinks that keep what they are given: a webhook and a mailbox."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from typing import Any

from lab.outside.service import Reply, Request, Service


class Webhook(Service):
    """https://hooks.test/anything: answers 204 and keeps the request."""

    def __init__(self) -> None:
        super().__init__()
        self._received: list[dict[str, Any]] = []

    def received(self) -> list[dict[str, Any]]:
        """What was accepted: time, client, method, path, headers, body."""
        return list(self._received)

    def forget(self) -> None:
        super().forget()
        self._received.clear()

    def answer(self, request: Request) -> Reply:
        self._received.append(
            {
                "time": time.time(),
                "client": request.client,
                "method": request.method,
                "path": request.path,
                "headers": request.headers,
                "body": request.body.decode(errors="replace"),
            }
        )
        return Reply(204)


class Mail(Service):
    """mail.test: an SMTP server (ports 25 and 587, no encryption, any login) that keeps every message."""

    def __init__(self) -> None:
        super().__init__()
        self._received: list[dict[str, Any]] = []

    def received(self) -> list[dict[str, Any]]:
        """Messages: time, client, sender, recipients, data."""
        return list(self._received)

    def forget(self) -> None:
        super().forget()
        self._received.clear()

    def keep(self, message: dict[str, Any]) -> None:
        self._received.append(message)

    def refusal(self) -> str | None:
        """The SMTP answer while failing on command, e.g. fail(450)."""
        failure = self._failure
        if failure is None:
            return None
        return f"{failure.kind} failing on command" if isinstance(failure.kind, int) else ""


class _SmtpHandler(socketserver.StreamRequestHandler):
    mail: Mail

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self._session()

    def _say(self, line: str) -> None:
        self.wfile.write(line.encode() + b"\r\n")

    def _session(self) -> None:
        self._sender, self._recipients = "", list[str]()
        self._say("220 mail.test ESMTP")
        while line := self.rfile.readline(2000):
            text = line.decode(errors="replace").strip()
            verb = text.split(" ")[0].split(":")[0].upper()
            answer = self._answer(verb, text)
            if answer is None:
                return
            self._say(answer)
            if verb == "QUIT":
                return

    def _answer(self, verb: str, text: str) -> str | None:
        """The answer to one command; None hangs up."""
        match verb:
            case "MAIL":
                self._sender, self._recipients = _address(text), []
                return self.mail.refusal() or ("250 2.1.0 fine" if self.mail.refusal() is None else None)
            case "RCPT":
                self._recipients.append(_address(text))
            case "DATA":
                self._say("354 go ahead")
                message = {"time": time.time(), "client": self.client_address[0], "sender": self._sender}
                self.mail.keep(message | {"recipients": self._recipients, "data": self._data()})
            case "AUTH" if text.upper().startswith("AUTH LOGIN"):
                for prompt in ("VXNlcm5hbWU6", "UGFzc3dvcmQ6")[text.count(" ") - 1 :]:
                    self._say(f"334 {prompt}")
                    self.rfile.readline(2000)
        answers = {"EHLO": "250-mail.test\r\n250-AUTH PLAIN LOGIN\r\n250 8BITMIME", "AUTH": "235 2.7.0 fine"}
        return answers.get(verb, "221 2.0.0 bye" if verb == "QUIT" else "250 2.0.0 fine")

    def _data(self) -> str:
        lines = []
        while (line := self.rfile.readline()) and line != b".\r\n":
            lines.append(line.removeprefix(b".") if line.startswith(b"..") else line)
        return b"".join(lines).decode(errors="replace")


def _address(text: str) -> str:
    return text.partition("<")[2].partition(">")[0]


class SmtpListener(socketserver.ThreadingTCPServer):
    """One address and port of the mailbox."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: str, port: int, mail: Mail) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), type("Handler", (_SmtpHandler,), {"mail": mail}))
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 3600}, daemon=True).start()
