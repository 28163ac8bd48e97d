"""A real server with the replaced system's clients, and with proxies of every habit before it."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.program import EXIT, HOME, Receiver, Server
from tests.integration.test_durability import wait_until

HOME6 = "2001:db8::5"


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server behind a proxy on this host that every connection comes from."""
    settings = {"VPN_SENTINEL_TRUSTED_PROXIES": "127.0.0.0/8,::1", "VPN_SENTINEL_HOME_NETWORKS": f"{HOME},{HOME6}/64"}
    with closing(Server(tmp_path_factory.mktemp("behind"), **settings)) as server:
        yield server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with closing(Server(tmp_path_factory.mktemp("plain"))) as server:
        yield server


FROM_HOME = {
    "as it should be": HOME,
    "a port, as Azure and IIS write it": f"{HOME}:51008",
    "quotes and brackets": f'"[{HOME6}]"',
    "brackets and a port": f"[{HOME6}]:443",
    "quotes, brackets and a port": f'"[{HOME6}]:443"',
    "IPv6 without brackets": HOME6,
    "IPv4 in IPv6's form": f"::ffff:{HOME}",
    "spaces": f"  {HOME} , 127.0.0.9 ",
    "what the client claims, before": f"193.32.249.70, {HOME}:51008",
    "nonsense of the client's, before": f"unknown, {HOME}",
    "a comma at the end": f"{HOME},",
}
NOBODY_KNOWS = {
    "half a bracket and quotes": f'"[{HOME6}"',
    "half a bracket": f"[{HOME6}",
    "unknown": "unknown",
    "a hidden name": "_hidden",
    "a name": "nas.example",
    "a port that is none": f"{HOME}:port",
    "Forwarded's form": f"for={HOME}",
    "nothing": "",
    "a link": "[]:443",
}


@pytest.mark.parametrize("header", FROM_HOME.values(), ids=FROM_HOME.keys())
def test_a_leak_is_seen_however_the_proxy_writes_the_address(
    behind: Server, header: str, request: pytest.FixtureRequest
) -> None:
    name = f"leak-{list(FROM_HOME.values()).index(header)}"
    assert behind.keepalive(name, EXIT, X_Forwarded_For=header)[0] == 200
    assert behind.state(name) == "leaking", request.node.name


@pytest.mark.parametrize("header", NOBODY_KNOWS.values(), ids=NOBODY_KNOWS.keys())
def test_an_address_that_is_not_understood_is_nobodys(behind: Server, header: str) -> None:
    """Neither the proxy's own nor a leak: the report counts, where it came from is unknown, and the log says so."""
    name = f"nobody-{list(NOBODY_KNOWS.values()).index(header)}"
    assert behind.keepalive(name, X_Forwarded_For=header)[0] == 200
    assert behind.state(name) == "pending"
    status, found = behind.ask(f"/api/v1/tunnels/{name}")
    assert (status, found["exit"]) == (200, {"ipv4": None, "ipv6": None})
    assert "the source of such requests is unknown" in behind.said()


def test_each_of_those_has_a_rate_of_its_own(tmp_path: Path) -> None:
    settings = {"VPN_SENTINEL_TRUSTED_PROXIES": "127.0.0.0/8", "VPN_SENTINEL_SERVER_RATE_LIMIT_REQUESTS": "2"}
    with closing(Server(tmp_path, **settings)) as server:
        for header in (f"{HOME}:51008", "[half"):
            one = [server.keepalive("nl", EXIT, X_Forwarded_For=header)[0] for _ in range(3)]
            other = server.keepalive("de", EXIT, X_Forwarded_For="146.70.1.2:7" if header[0] != "[" else header)[0]
            assert (one, other) == ([200, 200, 429], 200), header


NAMES = {
    "65 characters": "n" * 65,
    "100 characters": "n" * 100,
    "an underscore first": "_synology",
    "a dash first": "-nas",
    "dots": "nas.home.example",
    "one character": "a",
    "digits": "42",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_name_that_the_replaced_server_took_is_taken_and_its_leak_told(plain: Server, name: str) -> None:
    assert plain.keepalive(name, HOME)[0] == 200
    assert plain.state(name) == "leaking"


ODD = {
    "an address that is a name": {"public_ip": "vpn.example.org"},
    "an address that is a sentence": {"public_ip": "Error: could not determine IP"},
    "an address that is HTML": {"public_ip": "<html><head><title>503 Service Temporarily Unavailable</title>"},
    "an address with a line end": {"public_ip": f"{HOME}\n"},
    "an address that is null": {"public_ip": None},
    "a number": {"public_ip": 7},
    "an object": {"public_ip": {"ip": HOME}},
    "a place that is a word": {"public_ip": HOME, "location": "Unknown"},
    "places that are null": {"public_ip": HOME, "location": None, "dns_test": None},
    "a time in words": {"public_ip": HOME, "timestamp": "yesterday"},
    "a status of its own": {"public_ip": HOME, "status": "alive", "uptime": 1e9, "version": [1, 2]},
}


@pytest.mark.parametrize("said", ODD.values(), ids=ODD.keys())
def test_no_field_that_is_not_needed_refuses_a_report(plain: Server, said: dict[str, object]) -> None:
    name = f"odd-{list(ODD.values()).index(said)}"
    status, answer = plain.ask("/api/v1/keepalive", "POST", {"client_id": name, **said})
    assert (status, answer.get("status")) == (200, "ok")
    assert plain.state(name) == ("leaking" if str(said.get("public_ip")).strip() == HOME else "pending")


def test_a_tunnel_that_nothing_can_be_told_of_falls_silent_too(tmp_path: Path) -> None:
    """No home networks, so the old client's tunnel stays *pending*; people hear when its reports end."""
    with closing(Receiver()) as receiver:
        settings = {
            "VPN_SENTINEL_HOME_NETWORKS": "",
            "VPN_SENTINEL_CLIENT_TIMEOUT_MINUTES": "0.05",
            "VPN_SENTINEL_WEBHOOK_URL": receiver.url,
            "VPN_SENTINEL_WEBHOOK_ALLOW_PRIVATE": "true",
        }
        with closing(Server(tmp_path, **settings)) as server:
            assert server.keepalive("nl")[0] == 200
            assert server.state("nl") == "pending"
            wait_until(lambda: "silent" in [b["kind"] for b in receiver.took], 30, "its silence is told")
            assert server.state("nl") == "silent"
