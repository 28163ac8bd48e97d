"""The outside services behave, and misbehave, as the real ones do."""

from __future__ import annotations

import smtplib
import subprocess
import sys
import time

import maxminddb
import pytest

from lab import Home, Lab, plan, until

pytestmark = pytest.mark.acceptance

BOT = "https://api.telegram.org/bot42:secret"


@pytest.fixture
def home(lab: Lab) -> Home:
    """A healthy site; services that work and remember nothing."""
    for name in ("ipinfo", "ipapi", "ipwhois", "mullvad", "trace", "telegram", "webhook", "mail"):
        lab.service(name).heal()
        lab.service(name).forget()
    return lab.site("wg-closed")


def test_row_36_failing_services(lab: Lab, home: Home) -> None:
    info = lab.service("ipinfo")
    info.fail(429, times=1, retry_after=7)
    limited = home.http("GET", "https://ipinfo.io/json")
    assert limited.status == 429
    assert limited.headers["retry-after"] == "7"
    assert home.http("GET", "https://ipinfo.io/json").status == 200
    info.fail(403)
    assert home.http("GET", "https://ipinfo.io/json").status == 403
    info.fail("garbage")
    with pytest.raises(ValueError, match="decode"):
        home.http("GET", "https://ipinfo.io/json").json()
    info.fail("timeout")
    with pytest.raises(ConnectionError, match="timed out"):
        home.http("GET", "https://ipinfo.io/json", timeout=0.5)
    info.fail("reset")
    with pytest.raises(ConnectionError):
        home.http("GET", "https://ipinfo.io/json")
    info.heal()
    assert home.http("GET", "https://ipinfo.io/json").status == 200
    assert len(info.requests()) == 7
    assert home.http("GET", "https://ipwho.is/").json()["success"], "the others never failed"


def test_ip_api_refuses_https_and_counts(lab: Lab, home: Home) -> None:
    with pytest.raises(ConnectionError):
        home.http("GET", "https://ip-api.com/json")
    first = home.http("GET", "http://ip-api.com/json")
    left = int(first.headers["x-rl"])
    for _ in range(left):
        home.http("GET", "http://ip-api.com/json")
    limited = home.http("GET", "http://ip-api.com/json")
    assert limited.status == 429
    assert limited.headers["x-rl"] == "0"
    assert 0 < int(limited.headers["x-ttl"]) <= 60


def test_lite_and_mullvad(home: Home) -> None:
    assert home.http("GET", "https://api.ipinfo.io/lite/me").status == 403
    lite = home.http("GET", "https://api.ipinfo.io/lite/me?token=t").json()
    assert (lite["country_code"], lite["asn"]) == ("NL", "AS39351")
    mullvad = home.http("GET", "https://ipv4.am.i.mullvad.net/json").json()
    assert mullvad["mullvad_exit_ip"] is True
    assert home.http("GET", "https://ipv6.am.i.mullvad.net/json").json()["ip"] == home.exit6


def test_offline_database(lab: Lab, home: Home) -> None:
    with maxminddb.open_database(lab.mmdb) as database:
        exit4, home4, exit6 = (database.get(a) for a in (home.exit4, home.home4, home.exit6))  # type: ignore[arg-type]
        assert database.get("203.0.113.1") is None
    assert isinstance(exit4, dict)
    assert isinstance(home4, dict)
    assert exit4["country"]["iso_code"] == "NL"  # type: ignore[call-overload,index]
    assert exit4["autonomous_system_number"] == 39351
    assert home4["city"]["names"]["en"] == "Munich"  # type: ignore[call-overload,index]
    assert exit6 == exit4


def send(home: Home, text: str, **more: str) -> tuple[int, dict[str, object]]:
    answer = home.http("POST", f"{BOT}/sendMessage", json_body={"chat_id": 7, "text": text, **more})
    return answer.status, answer.json()


def test_telegram_messages(lab: Lab, home: Home) -> None:
    assert home.http("GET", f"{BOT}/getMe").json()["result"]["is_bot"] is True
    before = time.time()
    assert send(home, "<b>leaking</b> &amp; loud", parse_mode="HTML")[0] == 200
    message = lab.telegram.wait_message(lambda m: m["chat_id"] == 7)
    assert message["plain"] == "leaking & loud"
    assert before - 1 < message["time"] < time.time() + 1
    assert send(home, "x" * 4097)[0] == 400
    for broken in ("a < b", "<b>open", "<nosuch>x</nosuch>", "<b>x</i>"):
        status, body = send(home, broken, parse_mode="HTML")
        assert status == 400, broken
        assert "can't parse entities" in str(body["description"])
    assert len(lab.telegram.messages()) == 1


def test_telegram_failures(lab: Lab, home: Home) -> None:
    lab.telegram.fail(429, times=1, retry_after=3)
    status, body = send(home, "hello")
    assert (status, body["parameters"]) == (429, {"retry_after": 3})
    lab.telegram.fail(500, only="/sendMessage")
    assert send(home, "hello")[0] == 500
    assert home.http("GET", f"{BOT}/getMe").status == 200
    assert lab.telegram.messages() == []


def test_telegram_long_poll(lab: Lab, home: Home) -> None:
    poll = home.host.argv(["curl", "-sS", "-m", "10", f"{BOT}/getUpdates?timeout=8"])
    with subprocess.Popen(poll, env=home.host.environment(), stdout=subprocess.PIPE, text=True) as waiting:
        lab_calls = lab.telegram.calls
        until(lambda: any(c["method"] == "getUpdates" for c in lab_calls()), 5, "the poll to arrive")
        assert home.http("GET", f"{BOT}/getUpdates?timeout=1").status == 409
        lab.telegram.say(7, "/status")
        output, _ = waiting.communicate(timeout=5)
    assert '"text": "/status"' in output
    update = home.http("GET", f"{BOT}/getUpdates?timeout=0").json()["result"][0]
    after = home.http("GET", f"{BOT}/getUpdates?timeout=0&offset={update['update_id'] + 1}").json()
    assert after["result"] == []


def test_telegram_forgets_a_poller_that_was_killed(lab: Lab, home: Home) -> None:
    lab.telegram.forget()
    poll = home.host.argv(["curl", "-sS", "-m", "30", f"{BOT}/getUpdates?timeout=25"])
    with subprocess.Popen(poll, env=home.host.environment(), stdout=subprocess.DEVNULL) as waiting:
        until(lab.telegram.calls, 5, "the poll to arrive")
        waiting.kill()
    until(lambda: home.http("GET", f"{BOT}/getUpdates?timeout=0").status == 200, 5, "the killed poller to be forgotten")


def test_webhook(lab: Lab, home: Home) -> None:
    assert home.http("POST", "https://hooks.test/vpn", json_body={"state": "down"}).status == 204
    (row,) = lab.webhook.received()
    assert (row["path"], row["body"]) == ("/vpn", '{"state": "down"}')
    lab.webhook.fail(503)
    assert home.http("POST", "https://hooks.test/vpn", data="x").status == 503
    assert len(lab.webhook.received()) == 1


def test_mail(lab: Lab, home: Home) -> None:
    code = (
        "import smtplib\nwith smtplib.SMTP('mail.test', 587, timeout=5) as s:\n"
        " s.login('a', 'b')\n s.sendmail('a@x.test', ['b@y.test'], 'Subject: hi\\n\\n.dot\\nbye')\n"
    )
    home.run([sys.executable, "-c", code], check=True)
    (row,) = lab.mail.received()
    assert (row["sender"], row["recipients"]) == ("a@x.test", ["b@y.test"])
    assert "\r\n.dot\r\n" in row["data"]
    lab.mail.fail(450)
    refused = home.run([sys.executable, "-c", code])
    assert smtplib.SMTPSenderRefused.__name__ in refused.stderr


def test_dns_whoami_names(home: Home) -> None:
    def dig(*words: str) -> str:
        return home.run(["dig", "+short", *words]).stdout.strip()

    assert home.line.provider is not None
    assert dig("myip.opendns.com", "@208.67.222.222") == home.exit4
    assert dig("-6", "myip.opendns.com", "AAAA", "@2620:119:35::35") == home.exit6
    assert dig("TXT", "o-o.myaddr.l.google.com", "@ns1.google.com", "-4") == f'"{home.exit4}"'
    assert dig("whoami.akamai.net") == home.line.provider.resolver_egress
    assert dig("CH", "TXT", "whoami.cloudflare", f"@{plan.CLOUDFLARE6}") == f'"{home.exit6}"'
    assert dig("+tcp", "CH", "TXT", "whoami.cloudflare", "@1.1.1.1") == f'"{home.exit4}"'
    assert dig("+tcp", "sentinel.test", "@1.1.1.1") == plan.SRV4
    assert "NXDOMAIN" in home.run(["dig", "nothing.sentinel.test"]).stdout


def test_canary_zone_is_delegated_to_the_server(lab: Lab, home: Home) -> None:
    with lab.capture("srv", "udp port 53", interface="eth0") as seen:
        home.run(["dig", "+tries=1", "+time=1", "abc.canary.sentinel.test"])
    assert home.line.provider is not None
    assert home.line.provider.resolver_egress in {p.src for p in seen.packets() if p.dst in {plan.SRV4, plan.SRV6}}
