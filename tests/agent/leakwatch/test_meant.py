import pwd

import pytest

from vpn_sentinel.agent.leakwatch.meant import MeantOutside, parse_meant
from vpn_sentinel.agent.leakwatch.rules import PortRange
from vpn_sentinel.agent.net.endpoints import TCP, UDP
from vpn_sentinel.agent.settings import ProbeSettings
from vpn_sentinel.runtime.settings import SettingError, Source


def test_what_is_meant_is_said_in_words() -> None:
    root = pwd.getpwuid(0).pw_name
    found = parse_meant(
        f" published 8000/tcp; published 6881-6889/udp;port 123/UDP\nuser {root}; only user 997;interface eth1;"
    )
    assert found == MeantOutside(
        published=(PortRange(TCP, 8000, 8000), PortRange(UDP, 6881, 6889)),
        ports=(PortRange(UDP, 123, 123),),
        users=frozenset({0}),
        only_users=frozenset({997}),
        interfaces=frozenset({"eth1"}),
    )
    assert parse_meant("user 997 only").only_users == {997}
    assert parse_meant("") == MeantOutside()


@pytest.mark.parametrize(
    "text",
    ["published 8000", "published 0/tcp", "published 9-8/tcp", "published 70000/tcp", "port 53/icmp",
     "published 1-/tcp", "user", "user nobody-of-that-name", "open 80/tcp", "interface", "interface a/b",
     "only backup", "8000/tcp", "user ²", "; ".join(["port 1/udp"] * 65)],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_line_that_names_the_setting(text: str) -> None:
    with pytest.raises(SettingError) as error:
        ProbeSettings.read(Source({"VPN_SENTINEL_MEANT_OUTSIDE": text}))
    assert "VPN_SENTINEL_MEANT_OUTSIDE" in str(error.value)
    assert "\n" not in str(error.value)
