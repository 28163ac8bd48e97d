"""One lab for a module of ground truths; every test leaves it healed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lab import Home, Lab, Site

SITES = [
    Site("wg-closed", vpn="wireguard", provider="nl", kill_switch=True),
    Site("wg-open", vpn="wireguard", provider="nl", kill_switch=False),
    Site("wg-lan", vpn="wireguard", provider="us", kill_switch_lan=True, lan_server=True, reference=True),
    Site("ov-closed", vpn="openvpn", provider="ch", kill_switch=True),
    Site("ov-open", vpn="openvpn", provider="ch", kill_switch=False),
    Site("ov-lan", vpn="openvpn", provider="us", kill_switch_lan=True, lan_server=True, reference=True),
]


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.skip("the lab needs root: it makes network namespaces")
    with Lab(SITES) as running:
        yield running


def _healed(lab: Lab, name: str) -> Iterator[Home]:
    home = lab.site(name)
    try:
        yield home
    finally:
        home.heal()


@pytest.fixture(params=["wg", "ov"])
def closed(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Home]:
    """A site with a kill switch."""
    yield from _healed(lab, f"{request.param}-closed")


@pytest.fixture(params=["wg", "ov"])
def opened(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Home]:
    """A site without one."""
    yield from _healed(lab, f"{request.param}-open")


@pytest.fixture(params=["wg", "ov"])
def lan(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Home]:
    """A site whose kill switch lets the LAN through; a reference host and the server are on that LAN."""
    yield from _healed(lab, f"{request.param}-lan")
