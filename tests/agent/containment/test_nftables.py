"""nftables for real, in a network namespace of the test's own."""

import subprocess
import sys
from ipaddress import ip_address, ip_network

import pytest

from vpn_sentinel.agent.containment.instance_lock import SingleInstanceLock
from vpn_sentinel.agent.containment.nft import Library, Nftables, NftError
from vpn_sentinel.agent.containment.rules import (
    RELEASED_TABLE,
    TABLE,
    AllowedTraffic,
    removal,
    remove_release_marker,
    render,
)
from vpn_sentinel.agent.containment.table import comment_in, owner_of
from vpn_sentinel.agent.net.endpoints import TCP, Endpoint

WAYS = AllowedTraffic(
    tunnel="wg0",
    endpoints=(Endpoint(ip_address("185.65.134.2"), 51820), Endpoint(ip_address("2a03:1b20:3::2"), 443, TCP)),
    marks=((0xCA6C, 0xFFFFFFFF),),
    lan=(ip_network("192.168.20.0/24"), ip_network("2003:e0:1:100::/64")),
    resolvers=(ip_network("192.168.20.1/32"), ip_network("2003:e0:1:100::1/128")),
    leaking_names=(ip_address("127.0.0.11"),),
    forwards=True,
)


def ruleset() -> str:
    return subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("library", ["libnftables.so.1", "libnftables.so.none"], ids=["library", "program"])
async def test_the_kernel_takes_all_rules_and_names_their_owner(namespace: None, library: str) -> None:
    nft = Nftables(library)
    assert owner_of(TABLE) is None
    await nft(render(WAYS, "anna/0123"))
    await nft(render(WAYS, "anna/0123"))  # in place of the first
    assert owner_of(TABLE) == "anna/0123"
    assert ruleset().count("jump ways_out") == 2
    await nft(removal(released_owner="anna/0123"))
    assert owner_of(TABLE) is None
    assert owner_of(RELEASED_TABLE) == "anna/0123"
    await nft(remove_release_marker())
    assert ruleset() == ""


@pytest.mark.parametrize("library", ["libnftables.so.1", "libnftables.so.none"], ids=["library", "program"])
async def test_a_refusal_leaves_everything_as_it_was(namespace: None, library: str) -> None:
    nft = Nftables(library)
    await nft(render(WAYS, "anna/0123"))
    before = ruleset()
    with pytest.raises(NftError, match=r"\w"):
        await nft(removal() + "table inet other { chain x { nonsense } }\n")
    assert ruleset() == before


def test_tables_of_others_stay(namespace: None) -> None:
    nft = Library()
    nft.run("add table inet theirs")
    nft.run(render(WAYS, "anna/0123"))
    nft.run(removal())
    assert "table inet theirs" in ruleset()
    assert owner_of("theirs") == ""


async def test_without_library_and_program_it_says_so() -> None:
    with pytest.raises(NftError, match="install nftables"):
        await Nftables("libnftables.so.none", "/nowhere")("")
    with pytest.raises(NftError, match="is missing"):
        Library("libnftables.so.none")


def test_one_owner_in_a_namespace_and_free_after_death(namespace: None) -> None:
    one, other = SingleInstanceLock(), SingleInstanceLock()
    assert one.take()
    assert one.take()
    assert not other.take()
    one.leave()
    assert other.take()
    other.leave()
    holder = (
        "from vpn_sentinel.agent.containment.instance_lock import SingleInstanceLock; lock = SingleInstanceLock();"
        "print(lock.take(), flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert not one.take()
        process.kill()
    assert one.take()
    one.leave()


@pytest.mark.parametrize("listens", [True, False])
def test_another_users_program_cannot_keep_the_seat_from_an_agent(namespace: None, *, listens: bool) -> None:
    squat = (
        "import os, socket; os.setuid(1234); "
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind(chr(0) + 'vpn-sentinel-containment'); "
        f"{'s.listen(8); ' if listens else ''}print('there', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", squat], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        seat = SingleInstanceLock()
        assert seat.take()
        assert not seat.bound
        process.kill()
    assert seat.take()
    assert seat.bound
    seat.leave()


def test_a_comment_that_is_no_owners_is_not_repeated() -> None:
    for comment in ('x" } include "/etc/passwd', "x\ny", "x" * 200):
        assert comment not in removal(released_owner=comment)
    assert 'comment "anna/0123"' in removal(released_owner="anna/0123")


def test_release_from_the_command_line(namespace: None) -> None:
    command = [sys.executable, "-m", "vpn_sentinel", "release"]
    nothing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (nothing.returncode, nothing.stdout) == (0, "Nothing is closed here.\n")
    Library().run(render(WAYS, "anna/0123"))
    alone = subprocess.run(command, capture_output=True, text=True, check=False)
    assert alone.returncode == 0
    assert "the rules of anna are removed. No agent runs here." in alone.stdout
    assert ruleset() == ""
    Library().run(render(WAYS, "anna/0123"))
    seat = SingleInstanceLock()
    assert seat.take()
    beside = subprocess.run(command, capture_output=True, text=True, check=False)
    seat.leave()
    assert "only on a new leak" in beside.stdout
    assert owner_of(RELEASED_TABLE) == "anna/0123"


def test_release_without_the_right_to_says_what_is_missing(namespace: None) -> None:
    Library().run(render(WAYS, "anna/0123"))
    bare = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    command = [*bare, sys.executable, "-m", "vpn_sentinel", "release"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "CAP_NET_ADMIN" in done.stderr
    assert owner_of(TABLE) == "anna/0123"


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\xff", b"\1\2ab", b"\1\xff"])
def test_user_data_without_a_comment(data: bytes) -> None:
    assert comment_in(data) == ""
