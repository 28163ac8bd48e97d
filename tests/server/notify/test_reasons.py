"""Why a notice did not go out, as people read it."""

import re
from pathlib import Path

import pytest

from vpn_sentinel.server import notify
from vpn_sentinel.server.notify.channels import bot_api
from vpn_sentinel.server.notify.reasons import reason_text

SOURCES = "\n".join(p.read_text(encoding="utf-8") for p in Path(notify.__file__).parent.rglob("*.py"))
RAISED = {
    *re.findall(r'(?:Transient|Setup|Permanent)Error\(\s*"([a-z_]+)"', SOURCES),
    *re.findall(r'super\(\).__init__\("([a-z_]+)"', SOURCES),
    *re.findall(r'return "([a-z_]+)"', Path(notify.__file__).with_name("failures.py").read_text(encoding="utf-8")),
    "unreachable",
    *(reason for _, reason in bot_api._CHAT_ERRORS),
}


@pytest.mark.parametrize("channel", ["telegram", "webhook"])
def test_every_reason_is_told_in_words(channel: str) -> None:
    assert len(RAISED) > 15
    for reason in RAISED:
        said = reason_text(channel, reason)
        assert len(said.split()) > 5, (reason, said)
        assert reason not in said.split(), said


@pytest.mark.parametrize(
    ("channel", "reason", "part"),
    [
        ("telegram", "auth", "check TELEGRAM_BOT_TOKEN"),
        ("webhook", "auth", "check VPN_SENTINEL_WEBHOOK_URL"),
        ("webhook", "http_415", "HTTP 415 Unsupported Media Type"),
        ("webhook", "http_599", "HTTP 599: see its log"),
        ("telegram", "bug_KeyError", "a defect of VPN Sentinel (KeyError)"),
        ("pigeon", "hawk", "hawk"),
    ],
)
def test_words_say_what_to_look_at(channel: str, reason: str, part: str) -> None:
    assert part in reason_text(channel, reason)
