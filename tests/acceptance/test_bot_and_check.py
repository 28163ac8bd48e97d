"""What a person asks: the bot in its chat, and `check` in a terminal, on a real tunnel."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lab import Lab, Site, until
from tests.acceptance.stand import Stand

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with ExitStack() as ends:
        lab = ends.enter_context(Lab([Site("asked", provider="us", kill_switch=False)]))
        made = Stand(lab, "asked", 0, tmp_path_factory.mktemp("asked"))
        ends.callback(made.stop)
        made.start()
        made.wait_message("protected", 0, 10)
        yield made


def check(stand: Stand, *words: str) -> tuple[int, dict[str, Any]]:
    home = [w for n in stand.site.home_networks for w in ("--home", n)]
    done = stand.site.run([sys.executable, "-m", "vpn_sentinel", "check", "--json", *home, *words])
    return done.returncode, json.loads(done.stdout)


def test_check_says_protected_and_where(stand: Stand) -> None:
    status, said = check(stand, "--country", "US")
    assert (status, said["state"]) == (0, "protected"), said
    assert said["exit"]["ipv4"] == stand.site.exit4
    assert said["exit"]["country"] == "US"
    assert said["resolvers"], said
    assert said["tunnel"]["interface"] == "wg0"


def test_check_says_degraded_in_the_wrong_country(stand: Stand) -> None:
    status, said = check(stand, "--country", "NL")
    assert (status, said["state"]) == (1, "degraded")
    assert "country_mismatch" in [f["code"] for f in said["findings"]]


def test_check_says_leaking_without_the_tunnel(stand: Stand) -> None:
    stand.settle()
    stand.site.delete_tunnel()
    status, said = check(stand)
    stand.settle()
    assert (status, said["state"]) == (2, "leaking")


def test_check_waits_for_programs_that_find_no_name(stand: Stand) -> None:
    """They are told to ask over TCP (`use-vc`), which does not get through; our own questions by UDP do."""
    host, rule = stand.site.host, ["OUTPUT", "-p", "tcp", "--dport", "53", "-j", "DROP"]
    conf = host.directory / "nodes" / host.name / "resolv.conf"
    before = conf.read_bytes()
    stand.site.run(["iptables", "-I", *rule]).check_returncode()
    conf.write_bytes(before + b"options use-vc timeout:1 attempts:1\n")  # in place: it is a bind mount
    try:
        _, said = check(stand)
    finally:
        conf.write_bytes(before)
        stand.site.run(["iptables", "-D", *rule]).check_returncode()
    assert (said["state"], said["findings"][0]["code"]) == ("degraded", "dns_down"), said


def test_the_bot_answers_its_chat_and_no_other(stand: Stand) -> None:
    for question, answer in (("/ping", "pong"), ("/status", "asked"), ("/help", "/status")):
        before = len(stand.messages())
        stand.lab.telegram.say(stand.chat, question)
        message = stand.wait_message(answer, before, 10)
        assert int(message["chat_id"]) == stand.chat
        stand.quiet(before + 1, 2)
    everything = len(stand.lab.telegram.messages())
    stand.lab.telegram.say(stand.chat + 1, "/status")
    time.sleep(3)
    assert len(stand.lab.telegram.messages()) == everything


def test_the_status_shows_the_real_state(stand: Stand) -> None:
    stand.settle()
    stand.site.delete_tunnel()
    stand.wait_state("leaking", 5)
    stand.wait_message("LEAKING", 0, 5)
    before = len(stand.messages())
    stand.lab.telegram.say(stand.chat, "/status")
    assert "leaking" in stand.wait_message("asked", before, 10)["plain"].lower()
    stand.settle()


def test_two_servers_on_one_token_do_not_fight(stand: Stand) -> None:
    """Another server with a database of its own: one polls, the other is refused and keeps quiet; each question is
    answered once.
    """
    other = Stand(stand.lab, "asked", 1, stand.folder.parent / "other")
    other.server_settings |= {
        "TELEGRAM_BOT_TOKEN": stand.server_settings["TELEGRAM_BOT_TOKEN"],
        "TELEGRAM_CHAT_ID": stand.server_settings["TELEGRAM_CHAT_ID"],
    }
    other.server_log = "server-other"
    other.start_server()
    try:
        until(lambda: [c for c in stand.lab.telegram.calls() if c["status"] == 409], 60, "a poller to be refused")
        before = len(stand.messages())
        stand.lab.telegram.say(stand.chat, "/ping")
        stand.wait_message("pong", before, 60)
        stand.quiet(before + 1, 5)
        refused = [c for c in stand.lab.telegram.calls() if c["status"] == 409]
        time.sleep(10)
        again = [c for c in stand.lab.telegram.calls() if c["status"] == 409]
        assert len(again) - len(refused) <= 2
    finally:
        other.server.stop()
