"""What the zone answers, to whom, and how much: from bytes to bytes, read back by dnslib."""

import random
from ipaddress import ip_address

import pytest
from dnslib import EDNS0, QTYPE, RCODE, DNSRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.dns_seeds import seeds
from tests.server.dns_canary.test_message import query
from vpn_sentinel.server.dns_canary import message
from vpn_sentinel.server.dns_canary.query_limit import QueryLimit
from vpn_sentinel.server.dns_canary.responder import QueryOutcome, Responder
from vpn_sentinel.server.dns_canary.zone import Zone
from vpn_sentinel.wire import canary
from vpn_sentinel.wire.echo import ident_for, key_for

SECRET = bytes(range(32))
IDENT = ident_for(SECRET, "home")
KEY = key_for(SECRET, IDENT)
NONCE = b"12345678"
ZONE = "canary.example.org"
ASKER = "198.51.100.53"


def responder(*, servers: tuple[str, ...] = (f"ns.{ZONE}",), limit: QueryLimit | None = None) -> Responder:
    addresses = (ip_address("192.0.2.1"), ip_address("2001:db8::1"))
    return Responder(
        Zone(name=ZONE, servers=servers, addresses=lambda: addresses, secret=SECRET), limit or QueryLimit()
    )


def own_name(nonce: bytes = NONCE) -> str:
    return f"{canary.label(IDENT, nonce, KEY)}.{ZONE}"


def ask(
    name: str, kind: str = "TXT", *, host: str = ASKER, datagram: bool = False, opt: EDNS0 | None = None, **more: int
) -> tuple[DNSRecord, QueryOutcome]:
    made = responder()
    packed, outcome = made.respond(query(name, kind, opt=opt, **more), host, 0.0, datagram=datagram)
    assert packed is not None
    return DNSRecord.parse(packed), outcome


@pytest.mark.parametrize(
    ("host", "seen"),
    [(ASKER, ASKER), ("::ffff:198.51.100.53", ASKER), ("2001:db8::53", "2001:db8::53"), ("fe80::1%eth0", "fe80::1")],
)
def test_an_agent_learns_who_asked_for_it(host: str, seen: str) -> None:
    answer, outcome = ask(own_name(), host=host)
    assert outcome is QueryOutcome.SIGHTED
    (found,) = answer.rr
    assert (found.rtype, found.ttl) == (QTYPE.TXT, 0)
    strings = tuple(s.decode() for s in found.rdata.data)
    assert canary.read_answer(strings, NONCE, KEY) == ip_address(seen)
    assert answer.header.aa


def test_letter_case_carries_nothing_and_comes_back() -> None:
    rng = random.Random(7)  # as resolvers do against forgery
    name = "".join(rng.choice((c.upper(), c.lower())) for c in own_name())
    answer, outcome = ask(name)
    assert outcome is QueryOutcome.SIGHTED
    assert str(answer.q.qname) == str(answer.rr[0].rname) == name + "."


def test_over_udp_the_resolver_is_sent_to_tcp() -> None:
    answer, outcome = ask(own_name(), datagram=True)
    assert outcome is QueryOutcome.TRUNCATED
    assert (answer.header.tc, answer.header.rcode, answer.rr) == (1, RCODE.NOERROR, [])


@pytest.mark.parametrize(("asker", "kind"), [("185.65.200.7", "A"), ("2001:db8:5::7", "AAAA")])
def test_the_address_of_an_agents_name_is_where_the_question_came_from(asker: str, kind: str) -> None:
    packed, outcome = responder().respond(query(own_name(), kind), asker, 0.0, datagram=False)
    (record,) = DNSRecord.parse(packed).rr
    assert (str(record.rdata), record.ttl, outcome) == (asker, 0, QueryOutcome.SIGHTED)
    over_udp, _ = responder().respond(query(own_name(), kind), asker, 0.0, datagram=True)
    assert (DNSRecord.parse(over_udp).header.tc, DNSRecord.parse(over_udp).rr) == (1, [])


def soa_is_there(answer: DNSRecord) -> None:
    assert [(str(r.rname), r.rtype, r.ttl) for r in answer.auth] == [(ZONE + ".", QTYPE.SOA, 1)]
    assert answer.auth[0].rdata.times[4] == 1


@pytest.mark.parametrize(
    ("name", "kind", "rcode", "outcome"),
    {
        "a name that nobody could ask": (f"www.{ZONE}", "A", RCODE.NXDOMAIN, QueryOutcome.NXDOMAIN),
        "one below an agent's": (f"a.{own_name()}", "TXT", RCODE.NXDOMAIN, QueryOutcome.NXDOMAIN),
        "one with a wrong MAC": (f"{'0' * 48}.{ZONE}", "TXT", RCODE.NXDOMAIN, QueryOutcome.NXDOMAIN),
        "another type of an agent's": (own_name(), "MX", RCODE.NOERROR, QueryOutcome.ZONE),
        "an address of IPv6 where IPv4 asked": (own_name(), "AAAA", RCODE.NOERROR, QueryOutcome.ZONE),
        "another type of the apex": (ZONE, "A", RCODE.NOERROR, QueryOutcome.ZONE),
        "another type of the server": (f"ns.{ZONE}", "TXT", RCODE.NOERROR, QueryOutcome.ZONE),
    }.values(),
)
def test_what_is_not_there(name: str, kind: str, rcode: int, outcome: QueryOutcome) -> None:
    answer, got = ask(name, kind)
    assert (answer.header.rcode, got, answer.rr, answer.header.aa) == (rcode, outcome, [], 1)
    soa_is_there(answer)


def test_a_name_between_the_zone_and_its_server_exists() -> None:
    made = responder(servers=(f"ns.deep.{ZONE}",))
    packed, _ = made.respond(query(f"deep.{ZONE}", "A"), ASKER, 0.0, datagram=False)
    assert DNSRecord.parse(packed).header.rcode == RCODE.NOERROR


def test_the_apex_tells_of_the_zone_and_its_servers() -> None:
    soa, _ = ask(ZONE, "SOA")
    assert str(soa.rr[0].rdata).startswith(f"ns.{ZONE}. hostmaster.{ZONE}. ")
    ns, outcome = ask(ZONE.upper(), "NS")
    assert outcome is QueryOutcome.ZONE
    assert [str(r.rdata) for r in ns.rr] == [f"ns.{ZONE}."]
    assert {str(r.rdata) for r in ns.ar} == {"192.0.2.1", "2001:db8::1"}
    both, _ = ask(ZONE, "ANY")
    assert {r.rtype for r in both.rr} == {QTYPE.SOA, QTYPE.NS}


def test_the_servers_have_addresses() -> None:
    assert [str(r.rdata) for r in ask(f"ns.{ZONE}", "A")[0].rr] == ["192.0.2.1"]
    assert [str(r.rdata) for r in ask(f"NS.{ZONE}", "AAAA")[0].rr] == ["2001:db8::1"]


def test_servers_elsewhere_bring_no_addresses() -> None:
    packed, _ = responder(servers=("sentinel.example.net",)).respond(query(ZONE, "NS"), ASKER, 0.0, datagram=False)
    assert DNSRecord.parse(packed).ar == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [("example.org", "A"), ("org", "NS"), (".", "NS"), ("www.example.com", "A"), (f"x{ZONE}", "A"), (ZONE, "AXFR")],
)
@pytest.mark.parametrize("datagram", [True, False])
def test_everything_else_is_refused_without_content(name: str, kind: str, datagram: bool) -> None:
    answer, outcome = ask(name, kind, datagram=datagram)
    assert outcome is QueryOutcome.REFUSED
    assert (answer.header.rcode, answer.header.aa, answer.header.ra, answer.header.tc) == (RCODE.REFUSED, 0, 0, 0)
    assert (answer.rr, answer.auth, answer.ar) == ([], [], [])


def test_so_is_another_class() -> None:
    data = query(own_name())[:-2] + b"\x00\x03"
    packed, outcome = responder().respond(data, ASKER, 0.0, datagram=True)
    assert outcome is QueryOutcome.REFUSED
    assert packed is not None
    assert packed[3] & 0xF == RCODE.REFUSED


def test_an_unknown_version_of_edns_is_told_ours() -> None:
    answer, outcome = ask(own_name(), datagram=True, opt=EDNS0(version=9, udp_len=1232))
    assert outcome is QueryOutcome.BAD_VERSION
    assert (answer.ar[0].edns_ver, answer.ar[0].edns_rcode, answer.rr) == (0, 1, [])


def test_no_datagram_is_answered_by_a_larger_one() -> None:
    for seed in seeds(SECRET, ZONE):
        packed, _ = responder().respond(seed, ASKER, 0.0, datagram=True)
        assert packed is not None
        assert len(packed) <= len(seed)


@settings(max_examples=400)
@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=6)), max_size=4))
def test_nor_is_a_damaged_one(which: int, damages: list[tuple[int, bytes]]) -> None:
    known = list(seeds(SECRET, ZONE))
    data = bytearray(known[which % len(known)])
    for at, damage in damages:
        data[at : at + len(damage)] = damage
    for datagram in (True, False):
        packed, outcome = responder().respond(bytes(data), ASKER, 0.0, datagram=datagram)
        assert isinstance(outcome, QueryOutcome)
        assert packed is None or not datagram or len(packed) <= len(data)


# --- how much -----------------------------------------------------------------------------------------------------


def count(made: Responder, data: bytes, host: str, now: float, times: int = 200) -> int:
    return sum(made.respond(data, host, now, datagram=True)[0] is not None for _ in range(times))


def test_strangers_are_answered_a_few_times_a_second() -> None:
    made = responder(limit=QueryLimit(genuine=1000, other=10))
    data = query("www.example.com", "A")
    assert count(made, data, "203.0.113.1", 0.0) == 20
    assert count(made, data, "203.0.113.99", 0.0) == 0  # of the same network
    assert made.respond(data, "203.0.113.99", 0.0, datagram=True) == (None, QueryOutcome.LIMITED)
    assert count(made, data, "203.0.114.1", 0.0) == 20
    assert count(made, data, "203.0.113.1", 1.0) == 10


def test_garbage_counts_as_much() -> None:
    assert count(responder(limit=QueryLimit(other=10)), b"x" * 12 + b"\x00" * 8, "203.0.113.1", 0.0) <= 20


def test_agents_behind_one_resolver_are_not_strangers() -> None:
    assert count(responder(limit=QueryLimit(genuine=1000, other=10)), query(own_name()), ASKER, 0.0) == 200


def test_all_together_are_limited_too() -> None:
    made = responder(limit=QueryLimit(total=50))
    hosts = [f"203.0.{i}.1" for i in range(200)]
    assert sum(made.respond(query(own_name()), h, 1.0, datagram=True)[0] is not None for h in hosts) == 100


def test_the_limit_forgets_rather_than_grows() -> None:
    limit = QueryLimit(total=1e9)
    for i in range(30_000):
        limit.admits(bytes([10, i >> 8, i & 255]), 0.0, genuine=False)
    assert limit.networks == 20_000


def test_a_reply_is_never_answered() -> None:
    made = responder()
    packed, _ = made.respond(query(own_name()), ASKER, 0.0, datagram=True)
    assert packed is not None
    assert made.respond(packed, ASKER, 0.0, datagram=True) == (None, QueryOutcome.MALFORMED)
    assert message.HEADER.size == 12
