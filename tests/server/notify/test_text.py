"""What people read."""

from ipaddress import ip_address, ip_network
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.notice import Kind, Notice, summed_up
from vpn_sentinel.domain.observation import Answer, Canary, Observation, Probe, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import Code, Finding, State
from vpn_sentinel.server.notify import text
from vpn_sentinel.server.notify.split import split, utf16
from vpn_sentinel.server.notify.text import explain
from vpn_sentinel.server.tracking.enrichment import transport_findings

AMSTERDAM = ZoneInfo("Europe/Amsterdam")
UTC = ZoneInfo("UTC")
AT = 1_800_000_000.0
EXIT, HOME = ip_address("198.51.100.7"), ip_address("203.0.113.9")
LEAK = Finding(
    Code.IP_LEAK,
    "IPv4 traffic leaves from the home address 203.0.113.9.",
    {"address": "203.0.113.9", "seen_by": "cloudflare", "path": "outside"},
)
DEAD = Finding(Code.TUNNEL_DOWN, "The tunnel's interface wg0 is gone.", {"interface": "wg0"})
ABROAD = Finding(
    Code.COUNTRY_MISMATCH,
    "The exit 198.51.100.7 is in US, not in NL.",
    {"country": "US", "expected": "NL", "sources": "ipinfo, ipapi"},
)
BLIND = Finding(Code.NOTHING_SEEN, "No canary could be sent.")
QUIET = Finding(Code.NO_REPORTS, "No report for 92 s; who is gone cannot be seen.", {"silent_for_seconds": "92"})
OPEN = Finding(
    Code.KILLSWITCH_OPEN, "A packet sent beside the tunnel reached the first router.", {"router": "10.0.0.1"}
)
WHERE = {
    "place": "Amsterdam, NL",
    "provider": "Example & Sons AS64500",
    "timezone": "Europe/Amsterdam",
    "resolvers": ("198.51.100.53 NL",),
}

GOLDEN = {
    "the server has too much to do": (
        Notice(kind=Kind.SERVER_OVERLOADED, at=AT, details=("In the last minute its work was late by 23 s.",)),
        """\
🐌 VPN Sentinel has too much to do
In the last minute its work was late by 23 s.
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "the server keeps up again": (
        Notice(kind=Kind.SERVER_RECOVERED, at=AT + 420, began=AT),
        """\
🟢 VPN Sentinel can keep up again after 7 minutes
Began: 2027-01-15 09:00:00 CET (08:00:00 UTC)
Time: 2027-01-15 09:07:00 CET (08:07:00 UTC)""",
    ),
    "much in one": (
        summed_up(
            Notice(kind=Kind.RECOVERED, tunnel="nl-1", at=AT + 9, began=AT, was=State.DOWN, exit=EXIT),
            14,
            7,
            Notice(kind=Kind.LEAKING, tunnel="nl-1", at=AT, findings=(LEAK,)),
            None,
        ),
        """\
🟢 nl-1 is protected again after 9 seconds (it was leaking)
14 changes since the last message are summed up here: nl-1 changes too often to notify each.
Of them 7 were leaks.
Seen during the last leak: IPv4 traffic leaves from the home address 203.0.113.9.
Exit: 198.51.100.7
Began: 2027-01-15 09:00:00 CET (08:00:00 UTC)
Time: 2027-01-15 09:00:09 CET (08:00:09 UTC)""",
    ),
    "server started": (
        Notice(kind=Kind.SERVER_STARTED, at=AT, details=("version 2.0.0",)),
        """\
🚀 VPN Sentinel has started
version 2.0.0
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "the database has damage": (
        Notice(kind=Kind.DATABASE_DAMAGED, at=AT, details=("damage was found: x", "stop the server")),
        """\
🛑 VPN Sentinel's own database has damage
damage was found: x
stop the server
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "connected": (
        Notice(kind=Kind.CONNECTED, tunnel="nl-1", at=AT, exit=EXIT, findings=(OPEN,), **WHERE),  # type: ignore[arg-type]
        """\
🟢 nl-1 is connected and protected
Note: A packet sent beside the tunnel reached the first router. (router: 10.0.0.1)
What to do: Switch the VPN's kill switch on: without one, traffic leaks when the tunnel goes away.
Exit: 198.51.100.7
Place: Amsterdam, NL
Provider: Example & Sons AS64500
Time zone: Europe/Amsterdam
Resolvers: 198.51.100.53 NL
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "address changed": (
        Notice(
            kind=Kind.ADDRESS_CHANGED, tunnel="nl-1", at=AT, began=AT, exit=EXIT, old_exit=ip_address("2001:db8::7")
        ),
        """\
🔵 nl-1 has a new exit address
Exit: 2001:db8::7 → 198.51.100.7
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "port changed": (
        Notice(kind=Kind.PORT_CHANGED, tunnel="nl-1", at=AT, began=AT, exit=EXIT, old_port=41234, port=51820),
        """\
🔵 nl-1 has another forwarded port
Forwarded port: 41234 → 51820
What to do: Set the new port in the program that is to be reached by it.
Exit: 198.51.100.7
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "leaking became down": (
        Notice(kind=Kind.DOWN, tunnel="nl-1", at=AT, began=AT, was=State.LEAKING, exit=EXIT, findings=(DEAD,)),
        """\
🟠 nl-1 is down and no longer leaks
Why: The tunnel's interface wg0 is gone.
What to do: Bring the tunnel's interface back up.
Exit last seen: 198.51.100.7
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "home internet down": (
        Notice(kind=Kind.DOWN, tunnel="ref", role="reference", site="attic", at=AT, began=AT, exit=HOME),
        """\
🟠 Home internet of attic is down
Home address last seen: 203.0.113.9
Site: attic
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "leaking": (
        Notice(kind=Kind.LEAKING, tunnel="nl-1", at=AT, began=AT, exit=HOME, old_exit=EXIT, findings=(LEAK,)),
        """\
🔴 nl-1 is LEAKING
Why: IPv4 traffic leaves from the home address 203.0.113.9. (seen by: cloudflare, path: outside)
What to do: Stop the programs behind this tunnel, bring it back up, and switch its kill switch on.
Exit: 198.51.100.7 → 203.0.113.9
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "down": (
        Notice(kind=Kind.DOWN, tunnel="nl-1", at=AT + 4, began=AT, exit=EXIT, findings=(DEAD, OPEN)),
        """\
🟠 nl-1 is down
Why: The tunnel's interface wg0 is gone.
Why: A packet sent beside the tunnel reached the first router. (router: 10.0.0.1)
What to do: Bring the tunnel's interface back up.
What to do: Switch the VPN's kill switch on: without one, traffic leaks when the tunnel goes away.
Exit last seen: 198.51.100.7
Began: 2027-01-15 09:00:00 CET (08:00:00 UTC)
Time: 2027-01-15 09:00:04 CET (08:00:04 UTC)""",
    ),
    "degraded": (
        Notice(kind=Kind.DEGRADED, tunnel="nl-1", at=AT, exit=EXIT, findings=(ABROAD,)),
        """\
🟡 nl-1 is degraded
Why: The exit 198.51.100.7 is in US, not in NL. (sources: ipinfo, ipapi)
What to do: Choose a VPN server in an expected country, or add this country to the policy.
Exit: 198.51.100.7
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "silent": (
        Notice(kind=Kind.SILENT, tunnel="nl-1", at=AT, exit=EXIT, findings=(QUIET,)),
        """\
⚫ nl-1 is silent
Why: No report for 92 s; who is gone cannot be seen.
What to do: Look whether the agent runs and whether its tunnel is down.
Exit last seen: 198.51.100.7
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "unverified": (
        Notice(kind=Kind.UNVERIFIED, tunnel="nl-1", at=AT, exit=EXIT, findings=(BLIND,)),
        """\
🟣 nl-1 cannot be verified
Why: No canary could be sent.
What to do: No canary could be sent; look at the agent's log.
Exit last seen: 198.51.100.7
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "recovered": (
        Notice(kind=Kind.RECOVERED, tunnel="nl-1", at=AT, began=AT - 3905, was=State.LEAKING, exit=EXIT),
        """\
🟢 nl-1 is protected again after 1 hour 5 minutes (it was leaking)
Exit: 198.51.100.7
Began: 2027-01-15 07:54:55 CET (06:54:55 UTC)
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "recovered, and never protected before": (
        Notice(kind=Kind.RECOVERED, tunnel="nl-1", at=AT, began=AT - 11, was=State.LEAKING, first=True),
        """\
🟢 nl-1 is protected after 11 seconds (it was leaking)
Began: 2027-01-15 08:59:49 CET (07:59:49 UTC)
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
    "test": (
        Notice(kind=Kind.TEST, at=AT),
        """\
🔔 Test message of VPN Sentinel
Time: 2027-01-15 09:00:00 CET (08:00:00 UTC)""",
    ),
}


@pytest.mark.parametrize(("notice", "words"), GOLDEN.values(), ids=GOLDEN.keys())
def test_plain_text(notice: Notice, words: str) -> None:
    assert text.plain(notice, AMSTERDAM) == words


def test_every_kind_has_its_text() -> None:
    assert {notice.kind for notice, _ in GOLDEN.values()} == set(Kind)


def test_html() -> None:
    notice = Notice(
        kind=Kind.LEAKING,
        tunnel="a<b>&c",
        at=AT,
        exit=HOME,
        findings=(LEAK,),
        place='<script>"x"</script>',
        provider="A & B",
    )
    assert (
        text.html(notice, UTC)
        == """\
<b>🔴 a&lt;b&gt;&amp;c is LEAKING</b>
<b>Why:</b> IPv4 traffic leaves from the home address 203.0.113.9. (seen by: cloudflare, path: outside)
<b>What to do:</b> Stop the programs behind this tunnel, bring it back up, and switch its kill switch on.
<b>Exit last seen:</b> <code>203.0.113.9</code>
<b>Place:</b> &lt;script&gt;"x"&lt;/script&gt;
<b>Provider:</b> A &amp; B
<b>Time:</b> 2027-01-15 08:00:00 UTC"""
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "less than a second"),
        (1, "1 second"),
        (59.6, "1 minute"),
        (252, "4 minutes 12 seconds"),
        (3605, "1 hour"),
        (86400 * 2 + 3600 * 3 + 59, "2 days 3 hours"),
        (-5, "less than a second"),
    ],
)
def test_duration(seconds: float, words: str) -> None:
    assert text.duration(seconds) == words


def test_a_time_beyond_the_calendar_is_told_as_such() -> None:
    assert text.moment(1e30) == "an unknown time"


@given(st.text(st.characters(), max_size=500))
def test_text_from_outside_becomes_one_clean_line(value: str) -> None:
    cleaned = text.clean(value)
    assert len(cleaned) <= 300
    assert len(cleaned.splitlines()) <= 1
    cleaned.encode()  # no lone surrogate
    assert not set(cleaned) & set("\u202e\u2066\u200b\x00\x1b\x7f\ufeff")


@given(st.text(st.characters(), max_size=200), st.text(st.sampled_from('<>&";'), max_size=300))
def test_names_from_outside_open_no_tag(name: str, org: str) -> None:
    notice = Notice(
        kind=Kind.DOWN,
        tunnel=name,
        at=AT,
        provider=org,
        resolvers=(name, org),
        findings=(Finding(Code.NO_TRAFFIC, org, {name: org}),),
    )
    for line in text.html(notice, UTC).split("\n"):
        bare = line
        for tag in ("<b>", "</b>", "<code>", "</code>"):
            assert bare.count(tag) <= 1
            bare = bare.replace(tag, "")
        assert "<" not in bare
        assert ">" not in bare
        assert "&" not in bare.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=3000), st.integers(50, 400))
def test_a_split_text_loses_nothing_and_fits(long: str, limit: int) -> None:
    parts = split(long, limit)
    assert all(0 < utf16(p) <= limit for p in parts)
    assert "".join("".join(parts).split()) == "".join(long.split())


@given(st.lists(st.sampled_from(["&amp;", "&lt;", "<b>", "</b>", "x", "🔴", " "]), max_size=400))
def test_a_split_never_cuts_a_tag_or_a_reference(atoms: list[str]) -> None:
    for part in split("".join(atoms), 50):
        rest = part
        for atom in ("&amp;", "&lt;", "<b>", "</b>"):
            rest = rest.replace(atom, "")
        assert not set(rest) & set("&<>;")


def test_lines_stay_whole_when_they_fit() -> None:
    lines = ["🟢" * 20 + str(n) for n in range(10)]
    parts = split("\n".join(lines), 100)
    assert len(parts) == 5
    assert "\n".join(parts).split("\n") == lines


def test_a_long_notice_is_clipped_to_one_message() -> None:
    finding = Finding(Code.NO_TRAFFIC, "m" * 5000, {f"k{n}": "v" * 5000 for n in range(50)})
    notice = Notice(kind=Kind.DOWN, tunnel="t" * 5000, at=AT, findings=(finding,) * 3, details=("d" * 9000,))
    assert len(split(text.html(notice, UTC))) <= 2


@pytest.mark.parametrize(
    ("skew", "said"), [(-4000.0, "4000 s behind the server's"), (61.2, "61 s ahead of the server's")]
)
def test_a_wrong_clock_is_told_once_and_in_grammar(skew: float, said: str) -> None:
    (finding,) = transport_findings(skew, 0)
    assert explain(finding) == f"The agent's clock is {said}."


def test_an_old_clients_leak_names_no_path_that_nobody_knows() -> None:
    home = ip_address("83.46.112.77")
    seen = Observation(
        trigger=Trigger.KEEPALIVE,
        canaries=(Canary(probe=Probe.DEFAULT, target="client", family=4, answer=Answer.ANSWERED, address=home),),
    )
    finding = judge(seen, Policy(home_networks=(ip_network(home),))).findings[0]
    assert explain(finding) == "IPv4 traffic leaves from the home address 83.46.112.77. (seen by: client)"
