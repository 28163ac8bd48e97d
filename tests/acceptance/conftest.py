"""The lab for the acceptance tests: two, one with WireGuard and one with OpenVPN, each with a stand per situation."""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lab import Lab, Site
from tests.acceptance.stand import Stand

if os.geteuid() != 0:
    collect_ignore_glob = ["test_*"]

# Each site keeps to itself, so its row of faults runs beside the others'.
SITES = {
    # kill switch on: rows 1, 3, 4, 39, 40, 41
    "closed": {"kill_switch": True},
    # kill switch off: rows 2, 5, 6, 11, 12, 33, 36
    "open": {"kill_switch": False},
    # names and IPv6: rows 15, 18, 19, 21, 24, 25, 26
    "names": {"kill_switch": False},
    # healthy ones that must stay quiet: rows 17, 25 from the start
    "public": {"kill_switch": True, "resolver": "public"},
    "dropped": {"kill_switch": True, "ipv6": "dropped"},
}


@pytest.fixture(scope="session", params=["wireguard", "openvpn"])
def stands(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stand]]:
    """Every site of SITES with its server and its agent running, once for each kind of tunnel."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    with ExitStack() as ends:
        lab = ends.enter_context(Lab([Site(name, vpn=kind, provider="nl", **SITES[name]) for name in SITES]))  # type: ignore[arg-type]
        made = {}
        for number, name in enumerate(SITES):
            more = {"VPN_SENTINEL_EXPECTED_COUNTRIES": "NL,BE"} if name == "open" else {}
            made[name] = Stand(lab, name, number, folder, agent=more)
            ends.callback(made[name].stop)
            made[name].start_server()
        for stand in made.values():
            stand.start_agent()
        for stand in made.values():
            stand.wait_state("protected", 30)
            stand.wait_message("protected", 0, 10)
        yield made
