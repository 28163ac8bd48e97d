from pathlib import Path

import pytest

from tests.conftest import ManualClock
from vpn_sentinel.agent.introspect.settings import IntrospectSettings
from vpn_sentinel.agent.introspect.witnesses import Witnesses
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.net.urls import is_insecure
from vpn_sentinel.runtime.settings import SettingError, Source


def read(**values: str) -> IntrospectSettings:
    source = Source({f"VPN_SENTINEL_{k}": v for k, v in values.items()})
    return IntrospectSettings.read(source, insecure=is_insecure)


async def test_by_default_nobody_is_asked() -> None:
    assert read() == IntrospectSettings()
    nobody = Witnesses(read(), Client(names=HostResolver()), ManualClock(), on_change=lambda: None)
    assert await nobody.look(Survey()) == ()
    assert (nobody.endpoints(), nobody.forwarded_port()) == ((), None)


def test_all_of_it() -> None:
    found = read(
        OPENVPN_MANAGEMENT="127.0.0.1:7505", OPENVPN_MANAGEMENT_PASSWORD="word one", GLUETUN_URL="http://gluetun:8000/",
        GLUETUN_API_KEY="key-1", FORWARDED_PORT="45678",
    )  # fmt: skip
    assert (found.openvpn, found.gluetun, found.forwarded_port) == ("127.0.0.1:7505", "http://gluetun:8000", 45678)
    assert found.login.headers() == {"X-API-Key": "key-1"}
    assert "key-1" not in repr(found)
    assert "word" not in repr(found).replace("password", "")
    assert read(FORWARDED_PORT="/tmp/gluetun/forwarded_port").forwarded_port == Path("/tmp/gluetun/forwarded_port")


BAD = {
    "OPENVPN_MANAGEMENT": ["192.168.1.1:7505", "7505", "127.0.0.1:x", "management.sock"],
    "OPENVPN_MANAGEMENT_PASSWORD": ["a\nstate off"],
    "GLUETUN_URL": ["gluetun", "http://203.0.113.1:8000", "http://a.example:8000", "http://anna:p1@127.0.0.1:8000"],
    "GLUETUN_API_KEY": ["k\nX-Other: y", "schlüssel"],
    "GLUETUN_USER": ["anna:x", "anna"],
    "FORWARDED_PORT": ["0", "70000", "port", "gluetun/port"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_what_cannot_be_used_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingError) as caught:
        read(**{name: value})
    assert caught.value.name == f"VPN_SENTINEL_{name}"
    assert "p1" not in str(caught.value)
