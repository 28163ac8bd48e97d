import json
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmdb_writer import MMDBWriter
from netaddr import IPSet

from tests.agent.doubles import http, reply
from tests.conftest import ManualClock
from vpn_sentinel.agent.geo.databases import Databases
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.probes import mmdb, placing
from vpn_sentinel.agent.probes.place import PLACE_FRESH_S, Places
from vpn_sentinel.agent.probes.placing import BadAnswerError, Service
from vpn_sentinel.domain.observation import Place

EXIT = ip_address("185.65.134.10")
CLIENT = Client(names=HostResolver())
IPINFO = json.dumps(
    {"ip": str(EXIT), "city": "Amsterdam", "region": "North Holland", "country": "NL",
     "org": "AS39351 31173 Services AB", "timezone": "Europe/Amsterdam"}
)  # fmt: skip
IPAPI = json.dumps(
    {"status": "success", "query": str(EXIT), "country": "The Netherlands", "countryCode": "NL",
     "regionName": "North Holland", "city": "Amsterdam", "isp": "31173", "org": "",
     "as": "AS39351 31173 Services AB", "timezone": "Europe/Amsterdam"}
)  # fmt: skip
IPWHOIS = json.dumps(
    {"success": True, "ip": str(EXIT), "country_code": "NL", "region": "North Holland", "city": "Amsterdam",
     "connection": {"asn": 39351, "org": "31173 Services AB"}, "timezone": {"id": "Europe/Amsterdam"}}
)  # fmt: skip
TRACE = f"fl=1\nip={EXIT}\nts=1.2\nloc=NL\ncolo=AMS\n"

READ = {
    "ipinfo.io": (placing.read_ipinfo, IPINFO, "31173 Services AB"),
    "ip-api.com": (placing.read_ipapi, IPAPI, "31173"),
    "ipwho.is": (placing.read_ipwhois, IPWHOIS, "31173 Services AB"),
}


@pytest.mark.parametrize(("read", "body", "org"), READ.values(), ids=READ.keys())
def test_each_service_is_read(read, body: str, org: str) -> None:
    place = read(body.encode())
    assert (place.ip, place.country, place.region, place.city) == (EXIT, "NL", "North Holland", "Amsterdam")
    assert (place.timezone, place.asn, place.org) == ("Europe/Amsterdam", 39351, org)


def test_the_trace_knows_the_country_only() -> None:
    assert placing.read_trace(TRACE.encode()) == Place(ip=EXIT, source="cloudflare", country="NL")


BAD = [
    b"",
    b"<html>login</html>",
    b"[]",
    b"{}",
    b'{"ip":1}',
    b'{"ip":"no"}',
    b'{"status":"fail"}',
    b'{"success":false}',
    b"[" * 99999,
]


@pytest.mark.parametrize("read", [placing.read_ipinfo, placing.read_ipapi, placing.read_ipwhois, placing.read_trace])
@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
def test_a_page_of_something_else_is_no_place(read, body: bytes) -> None:
    with pytest.raises(BadAnswerError):
        read(body)


def test_texts_are_made_fit_to_keep_and_show() -> None:
    assert placing.clean("Z\u00fcrich\x1b[31m\u202e ") == "Z\u00fcrich[31m"
    assert placing.clean("x" * 500) == "x" * 200
    assert placing.clean("\n") is None
    assert placing.clean(7) is None


@pytest.mark.parametrize(
    ("said", "code"), [("nl", "NL"), ("XX", None), ("T1", None), ("ZZ", None), ("NLD", None), (None, None), (7, None)]
)
def test_country_codes(said: object, code: str | None) -> None:
    assert placing.country_code(said) == code


@pytest.mark.parametrize(
    ("said", "number"),
    [(64500, 64500), ("64500", 64500), ("AS64500", 64500), ("AS64500 Example", 64500), ("Example", None), (0, None),
     (2**32, None), (True, None), (None, None), ("9" * 30, None), ("\u0665", None)],
)  # fmt: skip
def test_networks_numbers(said: object, number: int | None) -> None:
    assert placing.asn_of(said) == number


@pytest.mark.parametrize("org", ["360", "3352", "Level 3", "ASN 24 Ltd", "as a service"])
def test_a_company_that_is_called_by_a_number_has_none(org: str) -> None:
    place = placing.read_ipinfo(json.dumps({"ip": str(EXIT), "org": org}).encode())
    assert (place.asn, place.org) == (None, org)
    by_isp = json.dumps({"status": "success", "query": str(EXIT), "isp": org, "org": org, "as": ""})
    assert placing.read_ipapi(by_isp.encode()).asn is None
    whois = json.dumps({"success": True, "ip": str(EXIT), "connection": {"isp": org, "org": org}})
    assert placing.read_ipwhois(whois.encode()).asn is None


def test_an_organisation_without_its_number() -> None:
    assert placing.without_asn("AS1") is None
    assert placing.without_asn("Example") == "Example"
    assert placing.without_asn(None) is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_no_answer_does_more_than_be_refused(said: object) -> None:
    for extra in ({}, {"ip": "192.0.2.1", "success": True, "status": "success", "query": "192.0.2.1"}):
        wrapped = {**(said if isinstance(said, dict) else {"org": said, "timezone": said, "connection": said}), **extra}
        for read in (placing.read_ipinfo, placing.read_ipapi, placing.read_ipwhois):
            try:
                read(json.dumps(wrapped).encode())
            except BadAnswerError:
                continue
        mmdb.read("file", EXIT, said)
        mmdb.read("file", EXIT, {"country": said, "city": said, "subdivisions": said, "location": said, "asn": said})


class World:
    """All services on one port, told apart by path; each path's answer can be changed."""

    def __init__(self) -> None:
        self.answers = {"/info": reply(IPINFO), "/whois": reply(IPWHOIS), "/api": reply(IPAPI)}

    def __call__(self, request: str) -> bytes:
        return self.answers[request.split(" ")[1]]

    @staticmethod
    def services(port: int) -> tuple[Service, ...]:
        base = f"http://127.0.0.1:{port}"
        return (
            Service("ipinfo.io", base, "/info", placing.read_ipinfo),
            Service("ipwho.is", base, "/whois", placing.read_ipwhois),
            Service("ip-api.com", base, "/api", placing.read_ipapi),
        )


def paths(got: list[str]) -> list[str]:
    return sorted(head.split(" ")[1] for head in got)


async def test_two_that_agree_are_enough_and_are_not_asked_again(clock: ManualClock) -> None:
    world = World()
    async with http(world) as (port, got):
        places = Places(CLIENT, world.services(port), clock)
        assert places.due(EXIT)
        await places.gather(EXIT)
        assert paths(got) == ["/info", "/whois"]
        assert not places.due(EXIT)
        assert not places.due(None)
        clock.now += PLACE_FRESH_S
        assert places.due(EXIT)
    assert {p.source for p in places.known([EXIT, None])} == {"ipinfo.io", "ipwho.is"}


async def test_when_two_disagree_a_third_is_asked(clock: ManualClock) -> None:
    world = World()
    world.answers["/info"] = reply(IPINFO.replace('"NL"', '"DE"'))
    async with http(world) as (port, got):
        places = Places(CLIENT, world.services(port), clock)
        await places.gather(EXIT)
    assert paths(got) == ["/api", "/info", "/whois"]
    assert sorted(p.country or "" for p in places.known([EXIT])) == ["DE", "NL", "NL"]


@pytest.mark.parametrize("status", [403, 429])
async def test_one_that_refuses_rests_for_hours(clock: ManualClock, status: int) -> None:
    world = World()
    world.answers["/info"] = reply("no", status)
    async with http(world) as (port, got):
        places = Places(CLIENT, world.services(port), clock)
        await places.gather(EXIT)
        clock.now += 3600 * 5
        got.clear()
        await places.gather(EXIT)
        assert paths(got) == ["/api", "/whois"]


@pytest.mark.parametrize(
    "answer", [reply("garbage"), reply("", 500), b"SSH-2.0\r\n"], ids=["garbage", "500", "not HTTP"]
)
async def test_one_that_fails_rests_for_minutes(clock: ManualClock, answer: bytes) -> None:
    world = World()
    world.answers["/info"] = answer
    async with http(world) as (port, got):
        places = Places(CLIENT, world.services(port), clock)
        await places.gather(EXIT)
        got.clear()
        clock.now += 30
        await places.gather(EXIT)
        assert "/info" not in paths(got)
        clock.now += 60
        world.answers["/info"] = reply(IPINFO)
        got.clear()
        await places.gather(EXIT)
        assert "/info" in paths(got)


async def test_a_service_that_says_how_long_is_obeyed(clock: ManualClock) -> None:
    world = World()
    world.answers["/info"] = reply(IPINFO, X_Rl="0", X_Ttl="20")
    world.answers["/whois"] = reply("", 429, Retry_After="120")
    async with http(world) as (port, got):
        places = Places(CLIENT, world.services(port), clock)
        await places.gather(EXIT)
        got.clear()
        clock.now += 21
        await places.gather(EXIT)
        assert "/info" in paths(got)
        assert "/whois" not in paths(got)
        clock.now += 100
        got.clear()
        await places.gather(EXIT)
        assert "/whois" in paths(got)


async def test_when_all_fail_the_old_opinion_stays(clock: ManualClock) -> None:
    world = World()
    async with http(world) as (port, _):
        places = Places(CLIENT, world.services(port), clock)
        await places.gather(EXIT)
        clock.now += PLACE_FRESH_S
        world.answers = dict.fromkeys(world.answers, reply("", 500))
        await places.gather(EXIT)
        assert {p.source for p in places.known([EXIT])} == {"ipinfo.io", "ipwho.is"}
        assert not places.due(EXIT)  # nobody is left to ask
        clock.now += 61
        assert places.due(EXIT)


async def test_memory_of_addresses_is_bounded(clock: ManualClock) -> None:
    world = World()
    async with http(world) as (port, _):
        places = Places(CLIENT, world.services(port)[:1], clock)
        for n in range(40):
            address = f"203.0.113.{n}"
            world.answers["/info"] = reply(IPINFO.replace(str(EXIT), address))
            await places.gather(ip_address(address))
    assert len(places._opinions) <= 17


@pytest.fixture
def database(tmp_path: Path) -> Path:
    writer = MMDBWriter(4, "GeoLite2-City", languages=["en"])
    writer.insert_network(
        IPSet(["185.65.134.0/24"]),
        {
            "country": {"iso_code": "NL"},
            "city": {"names": {"en": "Amsterdam"}},
            "subdivisions": [{"names": {"en": "North Holland"}}],
            "location": {"time_zone": "Europe/Amsterdam"},
            "autonomous_system_number": 39351,
            "autonomous_system_organization": "31173 Services AB",
        },
    )
    path = tmp_path / "city.mmdb"
    writer.to_db_file(str(path))
    return path


async def test_a_file_counts_as_an_opinion(database: Path, clock: ManualClock) -> None:
    databases = Databases(clock, files=[str(database)])
    world = World()
    async with http(world) as (port, got):
        places = Places(CLIENT, world.services(port)[:1], clock, look_up=databases.look_up)
        await places.gather(EXIT)
        assert paths(got) == ["/info"]
    (place, _) = places.known([EXIT])
    databases_name = databases.opened[0].name
    databases.close()
    assert databases_name.startswith("maxmind:20")
    assert place == Place(
        ip=EXIT, source=databases_name, country="NL", region="North Holland", city="Amsterdam",
        timezone="Europe/Amsterdam",
        asn=39351, org="31173 Services AB",
    )  # fmt: skip
    assert places.known([ip_address("192.0.2.1")]) == ()


def test_ipinfos_own_layout_is_read() -> None:
    place = mmdb.read(
        "lite", EXIT, {"country_code": "NL", "country": "Netherlands", "asn": "AS39351", "as_name": "31173"}
    )
    assert place == Place(ip=EXIT, source="lite", country="NL", asn=39351, org="31173")
    assert mmdb.read("lite", EXIT, {}) is None


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.mmdb").write_text("nothing")
    with pytest.raises(ValueError, match=r"x\.mmdb"):
        mmdb.open_file(tmp_path / "x.mmdb")
