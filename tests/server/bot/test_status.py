"""The answer to /status."""

import json
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import insert

from vpn_sentinel.server.bot import status
from vpn_sentinel.server.notify.split import split, utf16
from vpn_sentinel.server.store import queries
from vpn_sentinel.server.store.schema import tunnels
from vpn_sentinel.server.store.store import Store

NOW = 1_800_000_000.0
UTC = ZoneInfo("UTC")
ROW: dict[str, Any] = {
    "created_at": NOW - 9999, "state": "protected", "since": NOW - 7260, "findings": "[]", "memory": "", "seen_at": 0.0,
    "source": "agent", "version": "2", "interval": 30.0, "last_seen": NOW - 3, "deadline": None, "spool": "", "seq": 0,
    "exit4": "198.51.100.7", "exit6": None, "resolvers": "[]", "dns_loc": "", "dns_colo": "",
    "place": json.dumps({"ip": "198.51.100.7", "country": "NL", "city": "Amsterdam", "org": "Ex & Co", "asn": 64500}),
}  # fmt: skip
LEAK = {"code": "ip_leak", "message": "IPv4 traffic leaves from the home address 203.0.113.9.", "evidence": {}}


async def answer(store: Store, *rows: dict[str, Any]) -> str:
    for row in rows:
        await store.write(insert(tunnels).values({**ROW, **row}))
    return status.render(await queries.all_tunnels(store), NOW, UTC)


async def test_all_tunnels_the_worst_first(store: Store) -> None:
    leaking = {"name": "z-<leak>", "state": "leaking", "since": NOW - 61, "findings": json.dumps([LEAK]), "place": "{}"}
    silent = {"name": "m", "state": "silent", "since": NOW - 5, "last_seen": 0.0, "exit4": None, "place": "{}"}
    assert (
        await answer(store, {"name": "a"}, leaking, silent)
        == """\
<b>3 tunnels: 1 leaking, 1 silent, 1 protected</b>

🔴 <b>z-&lt;leak&gt;</b> LEAKING for 1 minute 1 second
IPv4 traffic leaves from the home address 203.0.113.9.
<b>Exit:</b> <code>198.51.100.7</code>
<b>Since:</b> 2027-01-15 07:58:59 UTC
<b>Last report:</b> 3 seconds ago

⚫ <b>m</b> silent for 5 seconds
<b>Since:</b> 2027-01-15 07:59:55 UTC

🟢 <b>a</b> protected for 2 hours 1 minute
<b>Exit:</b> <code>198.51.100.7</code>
<b>Place:</b> Amsterdam, NL, Ex &amp; Co
<b>Since:</b> 2027-01-15 05:59:00 UTC
<b>Last report:</b> 3 seconds ago"""
    )


async def test_a_place_stands_with_the_address_that_it_is_of(store: Store) -> None:
    said = await answer(store, {"name": "a", "exit6": "2001:db8::9"})
    assert said.index("198.51.100.7") < said.index("Amsterdam") < said.index("2001:db8::9")


async def test_a_place_of_another_address_is_not_shown(store: Store) -> None:
    assert "Amsterdam" not in await answer(store, {"name": "a", "exit4": "203.0.113.9"})


async def test_states_and_findings_of_a_newer_server_are_shown_as_far_as_they_go(store: Store) -> None:
    odd = {"name": "a", "state": "paused", "findings": '[{"code": "from_the_future", "message": "x"}]', "place": "?"}
    said = await answer(store, odd)
    assert "⚪ <b>a</b> unknown for" in said
    assert "\nx\n" in said


async def test_a_thousand_tunnels_come_in_parts_that_fit(store: Store) -> None:
    rows = [{**ROW, "name": f"tunnel-{n:04}", "findings": json.dumps([LEAK] * 9)} for n in range(300)]
    await store.write(insert(tunnels).values(rows))
    parts = split(status.render(await queries.all_tunnels(store), NOW, UTC))
    assert len(parts) > 10
    assert all(utf16(p) <= 4096 for p in parts)
    assert all(p.count("<b>") == p.count("</b>") for p in parts)
