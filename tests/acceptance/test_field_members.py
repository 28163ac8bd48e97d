"""Further members of the field's kinds, which `bench situations` does not try: two agents, ad blockers, resolv.conf."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lab import Lab, Site
from tests.acceptance.stand import INTERVAL, Stand

pytestmark = pytest.mark.acceptance

WHOAMI = ("whoami.akamai.net", "o-o.myaddr.l.google.com", "whoami.cloudflare", "resolver.dnscrypt.info")
NO_NAMESERVER = "# nameserver 10.2.0.1\n; search example.org\noptions edns0\n"


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with ExitStack() as ends:
        lab = ends.enter_context(Lab([Site("members", provider="nl", kill_switch=False)]))
        made = Stand(lab, "members", 0, tmp_path_factory.mktemp("members"), agent={"VPN_SENTINEL_GEO_DB": ""})
        ends.callback(made.stop)
        made.start()
        made.wait_message("protected", 0, 10)
        yield made


def moves(stand: Stand, since: float, name: str = "members") -> list[str]:
    found = stand.api(f"/tunnels/{name}/history?limit=200")["transitions"]
    return [t["new"] for t in sorted(found, key=lambda t: str(t["at"])) if stand.seconds(t["at"]) >= since]


def heard(stand: Stand, before: int) -> list[str]:
    """What was told of this tunnel; the second agent's end is told too, of the second one."""
    told = [m["plain"].splitlines()[0] for m in stand.messages()[before:]]
    return [line for line in told if "members" in line or "LEAKING" in line]


def test_two_agents_in_one_namespace_alarm_nobody(stand: Stand) -> None:
    """Each sends canaries beside the tunnel and listens there for what leaves: the other's are none of anybody's."""
    before, began = stand.settle(), time.time()
    folder = stand.folder / "second"
    settings = stand.agent_settings | {
        "VPN_SENTINEL_CLIENT_ID": "second",
        "VPN_SENTINEL_DATA_DIR": str(folder),
        "VPN_SENTINEL_HEALTH_PORT": "8083",
    }
    second = stand.site.spawn([sys.executable, "-m", "vpn_sentinel", "agent"], env=settings, log="agent-second")
    try:
        time.sleep(8 * INTERVAL)
        assert stand.api("/tunnels/second")["state"] == "protected"
        assert moves(stand, began) == []
        assert set(moves(stand, began, "second")) <= {"protected"}
    finally:
        second.stop()
    assert heard(stand, before) == []


@pytest.mark.parametrize("says", ["0.0.0.0", "192.168.1.2", "::"])
def test_whatever_an_ad_blocker_says_of_whoami_names_is_no_egress(stand: Stand, says: str) -> None:
    before, began = stand.settle(), time.time()
    answered = tuple(f"/{name}/{says}" for name in WHOAMI)
    stand.site._be(answered=answered, names_denied=False, resolvers=("127.0.0.1",))
    time.sleep(4 * INTERVAL)
    assert stand.status()["state"] == "protected"
    assert stand.codes() & {"dns_leak", "resolver_unexpected", "dns_intercepted"} == set(), stand.status()["findings"]
    assert moves(stand, began) == []
    assert heard(stand, before) == []


def test_a_resolv_conf_of_comments_only_is_told(stand: Stand) -> None:
    """No program finds a name: *degraded* `dns_down`, though the tunnel carries packets."""
    before = stand.settle()
    path = stand.site.run(["sh", "-c", "cat /etc/resolv.conf"], check=True).stdout
    write = "cat > /etc/resolv.conf <<'END'\n{}END\n"
    stand.site.run(["sh", "-c", write.format(NO_NAMESERVER)], check=True)
    try:
        stand.wait_message("degraded", before, 45)
        assert "dns_down" in stand.codes()
        assert not stand.codes() & {"ip_leak", "dns_leak", "split_route"}
    finally:
        stand.site.run(["sh", "-c", write.format(path)], check=True)
    stand.wait_state("protected", 60)
