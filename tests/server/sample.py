"""A database as it looks in the middle of a bad day: one tunnel in each state, with a past, and deliveries."""

import json
from typing import Any

from sqlalchemy import insert

from vpn_sentinel.runtime.settings import Source
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.store import schema
from vpn_sentinel.server.store.store import Store

KEY = "a-shared-key-of-tests"
HTML = """<script>alert(1)</script><img src=x onerror=alert(2)>"'&{{7*7}}"""


def settings(**env: str) -> ServerSettings:
    """Settings as the environment would give them; names without their prefix."""
    values = {"VPN_SENTINEL_DATA_DIR": "/nonexistent", "VPN_SENTINEL_API_KEY": KEY}
    return ServerSettings.read(Source(values | {f"VPN_SENTINEL_{k}": v for k, v in env.items()}))


def finding(code: str, message: str, **evidence: str) -> dict[str, Any]:
    return {"code": code, "message": message, "evidence": evidence}


def tunnel(name: str, state: str, now: float, **other: Any) -> dict[str, Any]:
    """A row of `tunnels`; findings, place and resolvers are given as they are, not as JSON."""
    row: dict[str, Any] = {
        "name": name,
        "created_at": now - 30 * 86400,
        "state": state,
        "since": now - 3600,
        "findings": [],
        "memory": "{}",
        "seen_at": 0.0,
        "source": "agent",
        "version": "2.0.0",
        "interval": 30.0,
        "last_seen": now - 4,
        "deadline": now + 90,
        "spool": "5f2c",
        "seq": 1,
        "exit4": "203.0.113.7",
        "exit6": None,
        "place": {
            "country": "NL",
            "region": "North Holland",
            "city": "Amsterdam",
            "timezone": "Europe/Amsterdam",
            "asn": 64500,
            "org": "Example VPN B.V.",
            "source": "ipinfo",
        },
        "resolvers": [{"ip": "203.0.113.53", "country": "NL", "org": "Example VPN B.V."}],
        "dns_loc": "",
        "dns_colo": "",
    }
    row |= other
    if row["place"]:
        row["place"] = {"ip": row["exit4"], **row["place"]}
    return row | {k: json.dumps(row[k]) for k in ("findings", "place", "resolvers")}


def fleet(now: float) -> list[dict[str, Any]]:
    leak = finding(
        "ip_leak", "IPv4 traffic leaves from the home address 198.51.100.23.", address="198.51.100.23", seen_by="server"
    )
    dns = finding(
        "dns_leak",
        "DNS queries come out at the home ISP's resolver 198.51.100.53.",
        egress="198.51.100.53",
        path="outside",
    )
    dead = finding(
        "no_traffic",
        "The interface wg0 is up, but nothing comes back through it.",
        interface="wg0",
        sent_bytes="48211",
        received_bytes="0",
    )
    place = finding(
        "country_mismatch",
        "The exit 192.0.2.80 is in DE, not in CH.",
        country="DE",
        expected="CH",
        sources="ipinfo, ipapi",
    )
    quiet = finding(
        "no_reports",
        "No report for 97 s; whether the tunnel or only the agent is gone cannot be seen from here.",
        silent_for_seconds="97",
    )
    open_ = finding(
        "killswitch_open", "A packet sent beside the tunnel came out at 198.51.100.23.", address="198.51.100.23"
    )
    nowhere: dict[str, object] = {"place": {}, "resolvers": []}
    return [
        tunnel(
            "seedbox-nl",
            "leaking",
            now,
            since=now - 73,
            findings=[leak, dns],
            exit4="198.51.100.23",
            exit6="2001:db8:a::23",
            place={"country": "ES", "city": "Valencia", "org": "Home Fibre S.A.", "asn": 64511},
            resolvers=[{"ip": "198.51.100.53", "country": "ES", "org": "Home Fibre S.A."}],
        ),
        tunnel("torrent-se", "down", now, since=now - 640, findings=[dead], exit4="192.0.2.14", last_seen=now - 11),
        tunnel(
            "office-ch",
            "degraded",
            now,
            since=now - 5400,
            findings=[place],
            exit4="192.0.2.80",
            place={"country": "DE", "city": "Frankfurt am Main", "org": "Other Transit GmbH"},
        ),
        tunnel(
            "cabin-no",
            "silent",
            now,
            since=now - 86400 * 2,
            last_seen=now - 86400 * 2 - 97,
            findings=[quiet],
            source="keepalive",
            interval=0.0,
            version="1.4.2",
            place={"country": "NO", "city": "Tromsø"},
            dns_loc="NO",
            dns_colo="OSL",
            resolvers=[],
        ),
        tunnel(
            "new-box",
            "pending",
            now,
            since=now - 120,
            last_seen=0.0,
            deadline=None,
            exit4=None,
            version="",
            source="",
            **nowhere,
        ),
        tunnel("media-nl", "protected", now, since=now - 86400 * 12, findings=[open_]),
        tunnel(
            "a-very-long-name.with_dots-and-more.of-a-host.in-a-rack.0123456",
            "protected",
            now,
            exit4="203.0.113.200",
            exit6="2001:db8:85a3:1234:5678:8a2e:370:7334",
            place={
                "country": "GB",
                "region": "England",
                "city": "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch",
                "org": "An Extraordinarily Verbose Network Operations Company, Limited Liability Partnership",
            },
        ),
    ]


async def fill(store: Store, now: float) -> dict[str, int]:
    """Write the fleet and its past; returns the ids of the tunnels by name."""
    wrote = await store.write(
        insert(schema.tunnels).returning(schema.tunnels.c.id, schema.tunnels.c.name).values(fleet(now))
    )
    ids = {row.name: row.id for row in wrote[0]}
    leaking, quiet = ids["seedbox-nl"], ids["cabin-no"]
    leak = json.dumps(
        [finding("ip_leak", "IPv4 traffic leaves from the home address 198.51.100.23.", address="198.51.100.23")]
    )
    body = json.dumps({"trigger": "network", "canaries": [], "took_ms": 41.5})
    await store.write(
        insert(schema.transitions).values(
            [
                {
                    "tunnel_id": leaking,
                    "at": now - 70000,
                    "decided_at": now - 70000,
                    "old": "pending",
                    "new": "protected",
                    "findings": "[]",
                },
                {
                    "tunnel_id": leaking,
                    "at": now - 30000,
                    "decided_at": now - 29996,
                    "old": "protected",
                    "new": "down",
                    "findings": "[]",
                },
                {
                    "tunnel_id": leaking,
                    "at": now - 28000,
                    "decided_at": now - 27996,
                    "old": "down",
                    "new": "protected",
                    "findings": "[]",
                },
                {
                    "tunnel_id": leaking,
                    "at": now - 73,
                    "decided_at": now - 73,
                    "old": "protected",
                    "new": "leaking",
                    "findings": leak,
                },
            ]
        ),
        insert(schema.incidents).values(
            [
                {
                    "tunnel_id": leaking,
                    "opened_at": now - 30000,
                    "closed_at": now - 28000,
                    "worst": "down",
                    "findings": "[]",
                },
                {"tunnel_id": leaking, "opened_at": now - 73, "closed_at": None, "worst": "leaking", "findings": leak},
                {"tunnel_id": quiet, "opened_at": now - 172800, "closed_at": None, "worst": "silent", "findings": "[]"},
            ]
        ),
        insert(schema.observations).values(
            [
                {
                    "tunnel_id": leaking,
                    "spool": "5f2c",
                    "seq": n,
                    "at": now - 300 + n,
                    "received_at": now - 299 + n,
                    "state": "leaking" if n > 227 else "protected",
                    "body": body,
                }
                for n in range(1, 297)
            ]
        ),
        insert(schema.outbox).values(
            [
                {
                    "id": 1,
                    "channel": "telegram",
                    "tunnel": "seedbox-nl",
                    "kind": "leaking",
                    "body": json.dumps({"at": now - 73, "kind": "leaking", "token": "123:SECRET"}),
                    "created_at": now - 73,
                    "due_at": now - 73,
                    "leased_until": 0,
                    "attempt": 2,
                    "settled_at": now - 60,
                    "outcome": "done",
                },
                {
                    "id": 2,
                    "channel": "webhook",
                    "tunnel": "seedbox-nl",
                    "kind": "leaking",
                    "body": "{}",
                    "created_at": now - 73,
                    "due_at": now + 5,
                    "leased_until": 0,
                    "attempt": 1,
                    "settled_at": None,
                    "outcome": None,
                },
            ]
        ),
        insert(schema.attempts).values(
            [
                {"delivery_id": 1, "attempt": 1, "at": now - 72, "result": "transient", "reason": "rate_limited"},
                {"delivery_id": 1, "attempt": 2, "at": now - 60, "result": "done", "reason": ""},
            ]
        ),
    )
    return ids
