"""Ways in which an agent loses its eyes, or what it remembers: what people hear, and that it comes back."""

import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import Lab, Site, until
from tests.acceptance.stand import INTERVAL, Stand
from tests.conftest import small_disk

pytestmark = pytest.mark.acceptance

# Nothing is declared, and no database tells of addresses: what is known of home was learned.
STRANGE = {"VPN_SENTINEL_HOME_NETWORKS": "", "VPN_SENTINEL_GEO_DB": ""}
SILENT = 3 * INTERVAL + 1  # seconds without a report


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with ExitStack() as ends:
        lab = ends.enter_context(Lab([Site("eyes", provider="nl", kill_switch=False)]))
        made = Stand(lab, "eyes", 0, tmp_path_factory.mktemp("eyes"), agent=STRANGE)
        ends.callback(made.stop)
        made.start()
        made.wait_message("protected", 0, 10)
        yield made


def moves(stand: Stand, since: float) -> list[str]:
    return [t["new"] for t in stand.history() if stand.seconds(t["at"]) >= since]


def settled(stand: Stand) -> tuple[int, float]:
    """Messages until now, and the time, once all is well and some rounds have said so."""
    before = stand.settle()
    return before, time.time()


def test_a_stopped_agent_is_silent_and_nothing_else_when_it_goes_on(stand: Stand) -> None:
    before, began = settled(stand)
    os.kill(stand.agent.pid, signal.SIGSTOP)
    try:
        stand.wait_state("silent", SILENT + 5)
        time.sleep(max(0.0, began + 30 - time.time()))
    finally:
        os.kill(stand.agent.pid, signal.SIGCONT)
    stand.wait_state("protected", 10)
    stand.wait_message("protected again", before, 10)
    stand.quiet(before + 2, 5)
    assert moves(stand, began) == ["silent", "protected"]


def test_out_of_descriptors_nothing_is_verified_and_then_it_is_again(stand: Stand) -> None:
    before, began = settled(stand)
    limits = resource.prlimit(stand.agent.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(stand.agent.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        stand.wait_message("verified", before, 60)
        assert stand.status()["state"] == "unverified"
        assert "nothing_seen" in stand.codes()
    finally:
        resource.prlimit(stand.agent.pid, resource.RLIMIT_NOFILE, limits)
    stand.wait_state("protected", 15)
    assert stand.agent.poll() is None
    assert moves(stand, began) == ["unverified", "protected"]


def test_a_tunnel_with_another_name_is_the_tunnel(stand: Stand) -> None:
    _, began = settled(stand)
    stand.site.run(["ip", "link", "set", "wg0", "name", "vpn0"], check=True)
    try:
        time.sleep(3 * INTERVAL)
        (newest, *_) = sorted(stand.observations(began, time.time()), key=lambda o: o["at"], reverse=True)
        assert "leaking" not in moves(stand, began)
        assert stand.status()["state"] == "protected"
        assert newest["body"]["link"]["name"] == "vpn0"
    finally:
        stand.site.run(["ip", "link", "set", "vpn0", "name", "wg0"], check=True)


@pytest.fixture
def disk(stand: Stand) -> Iterator[str]:
    """The agent's folder on a file system of 2 MB."""
    folder = stand.agent_settings["VPN_SENTINEL_DATA_DIR"]
    stand.settle()
    stand.agent.stop()
    with small_disk(folder, "2m", stand.site.run):  # where the site's programs run: it has mounts of its own
        stand.start_agent()
        try:
            yield folder
        finally:
            stand.agent.stop()
    stand.start_agent()


def test_a_full_disk_hides_no_leak(stand: Stand, disk: str) -> None:
    before, began = settled(stand)
    done = stand.site.run(["dd", "if=/dev/zero", f"of={disk}/fill", "bs=4096"])
    assert "No space left" in done.stderr
    until(lambda: "cannot be written" in stand.agent.output(), 15, "the agent to say that the disk is full")
    stand.site.delete_tunnel()
    stand.wait_message("leak", before, 10)
    assert "leaking" in moves(stand, began)
    stand.settle()


def forget_everything(stand: Stand) -> None:
    """The stack is recreated without its volume."""
    stand.agent.stop()
    shutil.rmtree(stand.agent_settings["VPN_SENTINEL_DATA_DIR"])


def test_what_the_server_remembers_proves_the_leak_of_an_agent_that_knows_nothing(stand: Stand) -> None:
    before, began = settled(stand)
    forget_everything(stand)
    stand.site.delete_tunnel()
    stand.start_agent()
    stand.wait_message("leak", before, 20)
    assert stand.status()["state"] == "leaking"
    assert "ip_leak" in stand.codes()
    assert "protected" not in moves(stand, began)
    stand.settle()


def test_behind_a_kill_switch_an_agent_that_knows_nothing_proves_no_leak(tmp_path: Path) -> None:
    site = Site("lan", provider="ch", kill_switch=True, kill_switch_lan=True, lan_server=True)
    with ExitStack() as ends:
        lab = ends.enter_context(Lab([site]))
        stand = Stand(lab, "lan", 0, tmp_path, agent=STRANGE, lan=True)
        ends.callback(stand.stop)
        stand.start()
        before, began = settled(stand)
        forget_everything(stand)
        stand.site.delete_tunnel()
        stand.start_agent()
        grace = 15  # VPN_SENTINEL_GRACE_UNVERIFIED
        until(lambda: stand.messages()[before:], grace + 10, "people to be told")
        assert stand.status()["state"] in ("down", "unverified")
        found = moves(stand, began)
        assert found
        assert not {"leaking", "protected"} & set(found)
