import os
from ipaddress import ip_address, ip_network
from pathlib import Path as FilePath

import pytest

from tests.agent.doubles import ETH, LO, WG, FakeKernel, udp
from tests.agent.test_dnswire import answer, record, text
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.rtnetlink import Route
from vpn_sentinel.agent.probes import dns, dnswire
from vpn_sentinel.agent.probes.dns import Nameserver
from vpn_sentinel.agent.probes.dnswire import DnsReply
from vpn_sentinel.domain.observation import Answer, Path
from vpn_sentinel.wire import canary
from vpn_sentinel.wire.messages import Echo

HERE = ip_address("127.0.0.1")
NOWHERE = Paths(None, Survey())


def test_a_resolv_conf_is_read_as_glibc_does() -> None:
    text_ = """# comment
nameserver 10.0.0.1
nameserver fe80::1%1
nameserver 10.0.0.1
search example.com
nameserver nonsense
nameserver
nameserver 10.0.0.2
nameserver 10.0.0.3
"""
    assert dns.nameservers(text_) == (
        Nameserver(ip_address("10.0.0.1")),
        Nameserver(ip_address("fe80::1"), 1),
    )  # one that is named twice counts twice among the first three


def test_a_zone_is_an_interface(tmp_path: FilePath) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver fe80::1%lo\nnameserver fe80::2%nonesuch\n")
    assert [s.scope for s in dns.system_nameservers(tmp_path / "resolv.conf")] == [1, 0]
    assert dns.system_nameservers(tmp_path / "none") == (dns.THIS_HOST,)
    assert dns.system_nameservers(tmp_path) == (dns.THIS_HOST,)
    os.mkfifo(tmp_path / "pipe")
    assert dns.system_nameservers(tmp_path / "pipe") == ()  # at once: it has no writer


# What glibc 2.36 makes of each: tried with res_ninit(3) over a bind-mounted file.
FILES = {
    "empty": ("", "127.0.0.1"),
    "comments": ("# nameserver 10.0.0.1\n; nameserver 10.0.0.2\n", "127.0.0.1"),
    "a blank before the word": ("  nameserver 10.0.0.1\nnameserver 10.0.0.2\n", "10.0.0.2"),
    "a tab behind it, and more behind the address": ("nameserver\t10.0.0.4 trailing junk\n", "10.0.0.4"),
    "ends of line of another system": ("nameserver 10.0.0.1\r\n", "127.0.0.1"),
    "short and hexadecimal": ("nameserver 10.1\nnameserver 0x0a000002\n", "10.0.0.1 10.0.0.2"),
    "a NUL behind the address": ("nameserver 10.0.0.7\0junk\nnameserver 10.0.0.8\0", "10.0.0.7 10.0.0.8"),
    "no end of line": ("nameserver 10.0.0.8", "10.0.0.8"),
    "the address on the next line": ("nameserver\n10.0.0.8\n", "127.0.0.1"),
    "no address": ("nameserver nonsense\nnameserver\nnameservers 10.0.0.1\n", "127.0.0.1"),
    "a port": ("nameserver 10.0.0.1#53\nnameserver 0.0.0.0\n", "0.0.0.0"),
    "four": ("".join(f"nameserver 10.0.0.{i}\n" for i in range(1, 5)), "10.0.0.1 10.0.0.2 10.0.0.3"),
    "other words": ("search a.example\noptions ndots:2 edns0\nnameserver ::1\ndomain b.example\n", "::1"),
    "a line that Unicode alone would break": ("# x\u2028nameserver 10.0.0.1\n", "127.0.0.1"),
}


LONG = "nameserver 10.0.0.1 " + "x" * 235 + "\nnameserver 10.0.0.2\n"
# Where the two libraries differ: what glibc 2.36 and musl 1.2.3 make of each, by res_ninit(3) and by __get_resolv_conf
# linked in, over a bind-mounted file.
DIFFERENT = {
    "ends of line of another system": ("nameserver 10.0.0.1\r\nnameserver ::1\r\n", "127.0.0.1", "10.0.0.1 ::1"),
    "other blanks": ("nameserver\v10.0.0.1\nnameserver 10.0.0.2\f\n", "127.0.0.1", "10.0.0.1 10.0.0.2"),
    "a line of 256 bytes": (LONG, "10.0.0.1 10.0.0.2", "10.0.0.2"),
    "one of 255": (LONG.replace("xx", "x", 1), "10.0.0.1 10.0.0.2", "10.0.0.1 10.0.0.2"),
    "a long one without an end": ("nameserver 10.0.0.1 " + "x" * 300, "10.0.0.1", "127.0.0.1"),
    "a zone that is nothing": ("nameserver fe80::1%nonesuch\nnameserver fe80::2%1x\n", "fe80::1 fe80::2", "127.0.0.1"),
    "no zone behind its sign": ("nameserver fe80::1%\nnameserver 10.0.0.1\n", "fe80::1 10.0.0.1", "10.0.0.1"),
    "a zone": ("nameserver fe80::1%lo\nnameserver fe80::2%1\n", "fe80::1%1 fe80::2%1", "fe80::1%1 fe80::2%1"),
    "a zone of what has none": ("nameserver 2001:db8::1%lo\nnameserver ::2\n", "2001:db8::1 ::2", "::2"),
    "a zone by number of what has none": ("nameserver 2001:db8::1%1\n", "2001:db8::1%1", "2001:db8::1%1"),
    "a zone beyond all": ("nameserver fe80::1%99999999999\n", "fe80::1", "127.0.0.1"),
    "a zone of too many digits": (f"nameserver fe80::1%{'1' * 5000}\n", "fe80::1", "127.0.0.1"),
    "a digit of another script": ("nameserver fe80::1%\u00b2\n", "fe80::1", "127.0.0.1"),
    "trailing blanks": ("nameserver \t 10.0.0.1 \t \n", "10.0.0.1", "10.0.0.1"),
    "comments behind": (
        "nameserver 10.0.0.1#x\nnameserver 10.0.0.2;x\nnameserver 10.0.0.3 # x\n", "10.0.0.3", "10.0.0.3",
    ),
    "brackets": ("nameserver [::1]\nnameserver [::1]:53\n", "127.0.0.1", "127.0.0.1"),
}  # fmt: skip


@pytest.mark.parametrize(("text_", "glibc", "musl"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_each_c_library_reads_it_in_its_own_way(text_: str, glibc: str, musl: str) -> None:
    def said(*, musl: bool) -> str:
        found = dns.nameservers(text_, musl=musl)
        return " ".join(f"{s.address}%{s.scope}" if s.scope else str(s.address) for s in found)

    assert (said(musl=False), said(musl=True)) == (glibc, musl)


@pytest.mark.parametrize("name", [k for k in FILES if not k.startswith(("a NUL", "ends of line"))])
def test_in_the_rest_both_read_the_same(name: str) -> None:
    text_, _ = FILES[name]
    assert dns.nameservers(text_, musl=True) == dns.nameservers(text_)


@pytest.mark.parametrize(("text_", "expected"), FILES.values(), ids=FILES.keys())
def test_a_resolv_conf_names_what_the_c_library_finds_there(tmp_path: FilePath, text_: str, expected: str) -> None:
    (tmp_path / "resolv.conf").write_bytes(text_.encode())
    found = dns.system_nameservers(tmp_path / "resolv.conf")
    assert " ".join(str(s.address) for s in found) == expected


def test_of_a_huge_resolv_conf_the_beginning_is_read(tmp_path: FilePath) -> None:
    (tmp_path / "resolv.conf").write_bytes(b"nameserver 10.0.0.1\n" + b"#" * 10_000_000)
    assert dns.system_nameservers(tmp_path / "resolv.conf") == (Nameserver(ip_address("10.0.0.1")),)


NOT_ON_THE_INTERNET = [
    "0.0.0.0", "127.0.0.1", "192.168.1.2", "10.0.0.1", "100.64.0.1", "169.254.1.1", "198.18.0.1", "224.0.0.1",
    "255.255.255.255", "192.0.2.1", "203.0.113.1", "::", "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1",
    "2001:db8::1", "64:ff9b::101:101",
]  # fmt: skip


@pytest.mark.parametrize("said", NOT_ON_THE_INTERNET)
def test_what_cannot_be_on_the_internet_is_no_egress(said: str) -> None:
    address = ip_address(said)
    readings = (
        dns.read_google(DnsReply(1, 0, (), ((said,),))),
        dns.read_akahelp(DnsReply(1, 0, (), (("ns", said), ("ecs", f"{said}/32")))),
        dns.read_akamai(DnsReply(1, 0, (address,))),
        dns.read_path(DnsReply(1, 0, (), ((said,),))),
    )
    assert set(readings) == {dns.Revealed()}


async def test_a_name_that_a_blocker_answers_itself_tells_nothing() -> None:
    async with udp(lambda data: answer(data, record(dnswire.A, bytes(4)))) as (port, _):
        seen = (await dns.resolvers(NOWHERE, [Nameserver(HERE, port=port)])).sightings
    assert {(s.answer, s.egress) for s in seen} == {(Answer.ANSWERED, None)}


async def test_our_own_zone_that_saw_a_private_address_tells_nothing() -> None:
    async with udp(lambda data: delegated(data, egress="192.168.1.2")) as (port, _):
        seen = await dns.resolvers(NOWHERE, [Nameserver(HERE, port=port)], ZONE)
    assert {(s.answer, s.egress) for s in seen.sightings if s.method == "canary"} == {(Answer.ANSWERED, None)}
    assert not seen.forged


def test_the_page_of_a_blocker_is_no_egress() -> None:
    assert dns.read_akamai(DnsReply(1, 0, (ip_address("146.112.61.104"),), aliased=True)) == dns.Revealed()
    mapped = dns.read_akamai(DnsReply(1, 0, (ip_address("0.0.0.0"), ip_address("::ffff:185.65.200.7"))))
    assert mapped.egress == ip_address("185.65.200.7")


async def test_an_answer_beside_a_refusal_is_none() -> None:
    refused = lambda data: answer(data, record(dnswire.A, bytes([185, 65, 200, 7])), flags=0x8183)  # noqa: E731
    async with udp(refused) as (port, _):
        found = await dns.lookup(Nameserver(HERE, port=port), dns.AKAMAI, limit=1, resend=None)
    assert found.value == dns.Revealed()


def test_google_tells_egress_and_client_subnet() -> None:
    reply = DnsReply(1, 0, (), (("185.65.200.7",), ("edns0-client-subnet 91.10.20.0/24",)))
    assert dns.read_google(reply) == dns.Revealed(egress=ip_address("185.65.200.7"), subnet=ip_network("91.10.20.0/24"))
    assert dns.read_google(DnsReply(1, 0)) == dns.Revealed()


def test_akahelp_tells_them_by_name() -> None:
    reply = DnsReply(1, 0, (), (("ns", "185.65.200.7"), ("ecs", "91.10.20.0/24/0"), ("odd",)))
    assert dns.read_akahelp(reply) == dns.Revealed(
        egress=ip_address("185.65.200.7"), subnet=ip_network("91.10.20.0/24")
    )


def test_akamai_and_the_path_tell_one_address() -> None:
    egress = ip_address("185.65.200.7")
    assert dns.read_akamai(DnsReply(1, 0, (egress,))).egress == egress
    assert dns.read_akamai(DnsReply(1, 0)).egress is None
    assert dns.read_path(DnsReply(1, 0, (), (("185.65.200.7",),))).client == ip_address("185.65.200.7")


@pytest.mark.parametrize("said", ["0.0.0.0/0", "::/0", "x", "", "10.0.0.0/99"])
def test_a_subnet_that_tells_nothing(said: str) -> None:
    assert dns.network_in(said) is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_five_to_ten_questions(count: int) -> None:
    plan = dns.plan(Nameserver(ip_address(f"10.0.0.{i}")) for i in range(count))
    assert 5 <= len(plan) <= 10
    assert len({method.name for _, method in plan}) >= 3
    assert len({server for server, _ in plan}) == count


def whoami(data: bytes) -> bytes:
    """A resolver that asks from 185.65.200.7 and refuses Chaos."""
    if data[-2:] == b"\x00\x03":
        return answer(data, flags=0x8185)
    if b"akahelp" in data:
        return answer(data, text(b"ns", b"185.65.200.7"))
    if b"akamai" in data:
        return answer(data, record(dnswire.A, bytes([185, 65, 200, 7])))
    return answer(data, text(b"185.65.200.7"))


async def test_a_resolver_shows_its_egress() -> None:
    async with udp(whoami) as (port, _):
        seen = (await dns.resolvers(NOWHERE, [Nameserver(HERE, port=port)])).sightings
    assert {s.method for s in seen} == {"google", "akahelp", "akamai"}
    assert {str(s.egress) for s in seen} == {"185.65.200.7"}
    assert {s.answer for s in seen} == {Answer.ANSWERED}
    assert {s.path for s in seen} == {Path.LOCAL}


async def test_one_that_tells_who_asked_proves_the_path() -> None:
    async with udp(lambda data: answer(data, text(b"185.65.134.4"))) as (port, _):
        seen = (await dns.resolvers(NOWHERE, [Nameserver(HERE, port=port)])).sightings
    assert [str(s.client) for s in seen if s.method == "path"] == ["185.65.134.4"]


async def test_one_that_can_look_nothing_up_is_out_of_reach() -> None:
    async with udp(lambda data: answer(data, flags=0x8182)) as (port, _):
        seen = (await dns.resolvers(NOWHERE, [Nameserver(HERE, port=port)])).sightings
    assert {s.answer for s in seen} == {Answer.UNREACHABLE}


async def test_one_that_refuses_is_there_and_tells_nothing() -> None:
    async with udp(lambda data: answer(data, flags=0x8185)) as (port, _):
        seen = (await dns.resolvers(NOWHERE, [Nameserver(HERE, port=port)])).sightings
    assert {(s.answer, s.egress) for s in seen} == {(Answer.ANSWERED, None)}


async def test_nonsense_is_no_answer() -> None:
    async with udp(lambda _: b"nonsense") as (port, _):
        found = await dns.lookup(Nameserver(HERE, port=port), dns.GOOGLE, limit=0.1, resend=None)
    assert found.answer is Answer.LOST


def test_the_path_to_a_nameserver_is_its_routes() -> None:
    kernel = FakeKernel(routes={"192.168.1.1": Route(interface=2)}, default=3)
    paths = Paths(kernel, Survey(interfaces=(LO, ETH, WG), tunnel="wg0", beside=(ETH,)))
    found = [dns.path_to(Nameserver(ip_address(a)), paths) for a in ("10.0.0.1", "192.168.1.1", "127.0.0.11", "::1")]
    assert found == [Path.TUNNEL, Path.OUTSIDE, Path.LOCAL, Path.LOCAL]
    scoped = [dns.path_to(Nameserver(ip_address("fe80::1"), i), paths) for i in (LO.index, ETH.index, WG.index, 99)]
    assert scoped == [Path.LOCAL, Path.OUTSIDE, Path.TUNNEL, Path.UNKNOWN]


async def test_something_that_answers_where_nobody_serves_is_noticed() -> None:
    async with udp(lambda data: answer(data)) as (port, _):
        assert await dns.intercepted(0.5, Nameserver(HERE, port=port))
    async with udp(lambda _: None) as (port, _):
        assert not await dns.intercepted(0.05, Nameserver(HERE, port=port))


def test_a_zone_stays_at_home() -> None:
    assert str(dns.plain(ip_address("fe80::1%eth0"))) == "fe80::1"
    assert dns.plain(HERE) == HERE


# --- with a zone of our own -----------------------------------------------------------------------------------------

ZONE = dns.CanaryZone("canary.example.org", b"identity", bytes(32))


def delegated(data: bytes, *, key: bytes = ZONE.key, egress: str = "185.65.134.9") -> bytes:
    """A resolver that passes canaries on to a server whose agents' keys are `key`."""
    if ZONE.name.split(".")[0].encode() not in data or b"nx-" in data:
        return answer(data, flags=0x8183)
    nonce = bytes.fromhex(data[13 : 13 + canary.LABEL_LENGTH].decode())[
        canary.ID_BYTES : canary.ID_BYTES + canary.NONCE_BYTES
    ]
    return answer(data, text(*(s.encode() for s in canary.answer(ip_address(egress), nonce, key))))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_with_a_zone_it_is_asked_first_and_strangers_remain(count: int) -> None:
    plan = dns.plan((Nameserver(ip_address(f"10.0.0.{i}")) for i in range(count)), ZONE)
    assert 5 <= len(plan) <= 10
    assert plan[0][1].name == "canary"
    assert len({method.name for _, method in plan}) >= 2
    own = [method.domain for _, method in plan if method.name == "canary"]
    assert len(set(own)) == len(own) >= count  # random names: no cache answers


async def test_our_own_server_tells_the_egress() -> None:
    async with udp(delegated) as (port, _):
        seen = await dns.resolvers(NOWHERE, [Nameserver(HERE, port=port)], ZONE)
    assert {str(s.egress) for s in seen.sightings if s.method == "canary"} == {"185.65.134.9"}
    assert not seen.forged


async def test_an_answer_in_its_name_is_forged_and_tells_nothing() -> None:
    async with udp(lambda data: delegated(data, key=b"x" * 32)) as (port, _):
        seen = await dns.resolvers(NOWHERE, [Nameserver(HERE, port=port)], ZONE)
    assert {(s.answer, s.egress) for s in seen.sightings if s.method == "canary"} == {(Answer.ANSWERED, None)}
    assert seen.forged


async def test_a_zone_that_does_not_exist_is_no_forgery() -> None:
    async with udp(lambda data: answer(data, flags=0x8183)) as (port, _):
        seen = await dns.resolvers(NOWHERE, [Nameserver(HERE, port=port)], ZONE)
    assert not seen.forged
    assert {s.egress for s in seen.sightings} == {None}


async def test_when_our_own_server_is_down_the_nameserver_is_not() -> None:
    def resolver(data: bytes) -> bytes:
        return answer(data, flags=0x8182) if b"canary" in data else whoami(data)

    async with udp(resolver) as (port, _):
        seen = await dns.resolvers(NOWHERE, [Nameserver(HERE, port=port)], ZONE)
    assert {s.answer for s in seen.sightings} == {Answer.ANSWERED}
    assert "canary" not in {s.method for s in seen.sightings}


@pytest.mark.parametrize("zone", [ZONE, None])
async def test_an_address_for_a_name_that_cannot_exist_is_rewriting(zone: dns.CanaryZone | None) -> None:
    async with udp(lambda data: answer(data, record(dnswire.A, bytes([203, 0, 113, 80])))) as (port, _):
        assert await dns.rewritten([Nameserver(HERE, port=port)], zone) is True
    got: list[bytes] = []

    def honest(data: bytes) -> bytes:
        got.append(data)
        return answer(data, flags=0x8183)

    async with udp(honest) as (port, _):
        assert await dns.rewritten([Nameserver(HERE, port=port)], zone) is False
    assert (b"canary" in got[0]) is (zone is not None)
    async with udp(lambda data: answer(data, flags=0x8182)) as (port, _):
        assert await dns.rewritten([Nameserver(HERE, port=port)], zone) is None
    assert await dns.rewritten([], zone) is None


def test_a_welcome_tells_the_zone() -> None:
    told = dns.LearnedZone()
    echo = Echo(port=1, id="00" * 8, key="11" * 32)
    assert told.learn("canary.example.org", echo)
    assert told.zone == dns.CanaryZone("canary.example.org", bytes(8), b"\x11" * 32)
    assert "11" not in repr(told)
    assert not told.learn("canary.example.org", echo)  # known
    for name, of in ((None, echo), ("canary.example.org", None), ("x" * 64, echo), ("a..b", echo), ("é.org", echo)):
        assert not told.learn(name, of)
        assert told.zone is None
