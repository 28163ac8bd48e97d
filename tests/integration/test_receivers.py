"""A real server whose receivers refuse: a leak's message is kept, what to do is said, and it is told in the end."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.integration.program import HOME, Receiver, Server
from tests.integration.test_durability import wait_until

# One delivery asks every half minute whether a channel works again.
ASKED_AGAIN = 45.0


def telegram(status: int, description: str) -> tuple[int, str, bytes]:
    return (
        status,
        "application/json",
        json.dumps({"ok": False, "error_code": status, "description": description}).encode(),
    )


PAGE = b"<html><head><title>Blocked</title></head><body>Your request was blocked.</body></html>"
OK = (200, "application/json", b'{"ok": true, "result": {}}')
TELEGRAM = {
    "topic-closed": telegram(400, "Bad Request: TOPIC_CLOSED"),
    "topic-deleted": telegram(400, "Bad Request: message thread not found"),
    "no-rights": telegram(400, "Bad Request: not enough rights to send text messages to the chat"),
    "no-admin": telegram(400, "Bad Request: need administrator rights in the channel chat"),
    "peer": telegram(400, "Bad Request: PEER_ID_INVALID"),
    "restricted": telegram(403, "Forbidden: bot was kicked from the supergroup chat"),
    "a-page": (400, "text/html", PAGE),
    "a-login": (200, "text/html", PAGE),
}
WEBHOOK = {
    **{
        f"http-{status}": (status, "application/json", b'{"message": "no"}')
        for status in (402, 409, 415, 421, 422, 451)
    },
    "a-page": (400, "text/html", PAGE),
    "cloudflare": (403, "text/html", PAGE),
    "a-proxy": (407, "text/html", PAGE),
    "no-service": (404, "text/plain", b"no_service"),
    "not-acceptable": (406, "text/html", PAGE),
    "unknown": (499, "text/plain", b""),
}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with closing(Receiver()) as made:
        yield made


def names_it(body: dict[str, Any], name: str) -> bool:
    return f"tunnel-{name}" in (body.get("tunnel") or body.get("text", ""))


def told(receiver: Receiver, name: str) -> bool:
    return any(names_it(body, name) for body in receiver.took)


def refuse_each(server: Server, receiver: Receiver, channel: str, answers: dict[str, tuple[int, str, bytes]]) -> None:
    """One tunnel after another leaks, each to another refusal; a fresh leak asks a failing channel at once."""
    names = list(answers)

    def says(body: dict[str, Any]) -> tuple[int, str, bytes]:
        # All else that is told is refused too: one message that is taken shows that the channel works.
        return next((answers[name] for name in names if names_it(body, name)), answers[names[0]])

    receiver.says = says
    for name in names:
        assert server.keepalive(f"tunnel-{name}", HOME)[0] == 200
        wait_until(lambda n=name: any(names_it(body, n) for _, _, body in receiver.asked), ASKED_AGAIN, name)
    wait_until(lambda: f"{channel} fails" in json.dumps(server.ready()[1]), 10, "health names the channel")
    assert server.ready()[0] == 200
    _, found = server.ask("/api/v1/deliveries?limit=200")
    owed = {d["tunnel"]: d["status"] for d in found["deliveries"] if d["channel"] == channel and d["kind"] == "leaking"}
    assert {owed.get(f"tunnel-{name}") for name in names} <= {"due", "leased"}, owed
    receiver.says = lambda _: OK
    wait_until(lambda: all(told(receiver, name) for name in names), ASKED_AGAIN, "all leaks are told")


@pytest.mark.slow
def test_whatever_telegram_refuses_a_leak_for_it_is_told_in_the_end(receiver: Receiver, tmp_path: Path) -> None:
    settings = {
        "TELEGRAM_BOT_TOKEN": "123456:the-token-of-a-bot",
        "TELEGRAM_CHAT_ID": "-1001234",
        "VPN_SENTINEL_TELEGRAM_API_URL": receiver.url,
    }
    with closing(Server(tmp_path, **settings)) as server:
        refuse_each(server, receiver, "telegram", TELEGRAM)
        said = server.said()
    assert "given up" not in said
    assert "the-token-of-a-bot" not in said


@pytest.mark.slow
def test_whatever_a_webhook_refuses_a_leak_for_it_is_told_in_the_end(receiver: Receiver, tmp_path: Path) -> None:
    settings = {"VPN_SENTINEL_WEBHOOK_URL": f"{receiver.url}/hook", "VPN_SENTINEL_WEBHOOK_ALLOW_PRIVATE": "true"}
    with closing(Server(tmp_path, **settings)) as server:
        refuse_each(server, receiver, "webhook", WEBHOOK)
        said = server.said()
    assert "given up" not in said
