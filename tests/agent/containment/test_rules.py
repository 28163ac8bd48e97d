"""The text of the rules, whole: whoever changes it sees what a packet will meet."""

from ipaddress import ip_address, ip_network

import pytest

from vpn_sentinel.agent.containment.rules import AllowedTraffic, removal, render
from vpn_sentinel.agent.net.endpoints import TCP, Endpoint

FULL = AllowedTraffic(
    tunnel="wg0",
    endpoints=(Endpoint(ip_address("185.65.134.2"), 51820), Endpoint(ip_address("2a03:1b20:3::2"), 443, TCP)),
    services=(Endpoint(ip_address("192.168.20.2"), 5000, TCP),),
    marks=((0xCA6C, 0xFFFFFFFF),),
    lan=(ip_network("192.168.20.0/24"), ip_network("2003:e0:1:100::/64")),
    resolvers=(ip_network("192.168.20.1/32"),),
    leaking_names=(ip_address("127.0.0.11"),),
    forwards=True,
)
GOLDEN = """\
table inet vpn_sentinel
delete table inet vpn_sentinel
table inet vpn_sentinel {
  comment "anna/0123"
  counter held {
  }
  chain ways_out {
    oifname "lo" accept
    oifname "wg0" accept
    ip daddr 185.65.134.2 udp dport 51820 accept
    ip6 daddr 2a03:1b20:3::2 tcp dport 443 accept
    ip daddr 192.168.20.2 tcp dport 5000 accept
    ip daddr 192.168.20.1/32 meta l4proto { tcp, udp } th dport { 53, 853 } accept
    meta l4proto { tcp, udp } th dport { 53, 853 } counter name "held" drop
    ip daddr 224.0.0.0/24 accept
    ip6 daddr fe80::/10 accept
    ip6 daddr ff02::/16 accept
    ip daddr 192.168.20.0/24 accept
    ip6 daddr 2003:e0:1:100::/64 accept
    udp sport 68 udp dport 67 accept
    udp sport 546 udp dport 547 accept
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report } accept
    counter name "held" drop
  }
  chain output {
    type filter hook output priority filter + 10; policy accept;
    jump ways_out
  }
  chain forward {
    type filter hook forward priority filter + 10; policy accept;
    jump ways_out
  }
  chain names {
    type filter hook output priority raw; policy accept;
    ip daddr 127.0.0.11 meta l4proto { tcp, udp } th dport 53 drop
  }
}
"""


def test_rules_with_everything() -> None:
    assert render(FULL, "anna/0123") == GOLDEN


def test_without_known_endpoints_the_mark_tells_the_tunnels_own_packets() -> None:
    text = render(AllowedTraffic(tunnel="wg0", marks=((0xCA6C, 0xFFFFFFFF),)), "a/0")
    assert "meta mark & 0xffffffff == 0xca6c accept" in text
    assert "chain forward" not in text
    assert "chain names" not in text


def test_no_rule_lets_old_flows_live() -> None:
    assert "ct " not in render(FULL, "a/0")


@pytest.mark.parametrize("name", ['wg0" accept; #', "wg*", "", "a-name-too-long-for-linux"])
def test_a_name_that_cannot_stand_in_a_rule_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be used in a rule"):
        AllowedTraffic(tunnel=name)


def test_removal_is_no_error_where_nothing_is() -> None:
    assert removal() == "table inet vpn_sentinel\ndelete table inet vpn_sentinel\n"
    assert 'table inet vpn_sentinel_released {\n  comment "anna/0123"\n}' in removal(released_owner="anna/0123")
