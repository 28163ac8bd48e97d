"""Names led elsewhere by this host's own rules: real sockets, real nftables, in a namespace of their own."""

import socket
from ipaddress import ip_address

from tests.agent.leakwatch.test_watch import ran
from vpn_sentinel.agent.leakwatch.diverted import is_diverted
from vpn_sentinel.agent.net.own import OwnSockets
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.agent.probes import dnswire
from vpn_sentinel.agent.probes.tag import PROBE_HOPS, dns_question

RULES = """
from ipaddress import ip_address
from vpn_sentinel.agent.probes import dns

def nft(rules):
    subprocess.run(["nft", "-f", "-"], input=rules.encode(), check=True)

def led(rule, priority=-100):
    nft(f"table inet led {{ chain out {{ type nat hook output priority {priority}; {rule}; }}; }}")

async def ask(server="10.65.0.1"):
    return await dns.lookup(dns.Nameserver(ip_address(server)), dns.GOOGLE, limit=0.1, resend=None)
"""


def test_a_socket_of_the_other_family_with_the_same_port_proves_nothing() -> None:
    """A canary that is bound to a device, and a lookup over IPv4 beside it."""
    own = OwnSockets(lambda: 0.0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lookup:
        lookup.connect(("127.0.0.1", 53))
        own.add(lookup)
        port = lookup.getsockname()[1]
        payload = dns_question(dnswire.query(0, "a.example", dnswire.A), port)

        def leaves(source: str, to: str) -> bool:
            return is_diverted(
                Packet(
                    protocol=socket.IPPROTO_UDP, source=ip_address(source), destination=ip_address(to),
                    source_port=port, destination_port=53, ttl=PROBE_HOPS, payload=payload,
                ),
                own,
            )  # fmt: skip

        assert not leaves("2001:db8:7::2", "2606:4700:4700::1111")
        assert leaves("192.168.7.2", "203.0.113.53")
        assert not leaves("192.168.7.2", "127.0.0.1")


async def test_our_question_that_leaves_for_another_nameserver_shows_the_way_of_all() -> None:
    seen = await ran(f"""{RULES}
watch = make()
led("udp dport 53 dnat ip to 203.0.113.53")
await ask()
await until(lambda: acted)
say(flows=flows(watch), names=[e.name for e in acted])
""")
    assert seen["flows"] == [["203.0.113.53", 53, 1]]
    assert seen["names"] == [None]  # it is our own question: no program asked for that name


async def test_it_is_seen_though_the_rule_gives_it_a_mark_that_is_a_vpns() -> None:
    seen = await ran(f"""{RULES}
for line in ("rule add pref 800 fwmark 7 lookup 100", "route add default via 192.168.7.1 dev eth0 table 100",
             "link add wg0 type veth peer name inside", "link set inside up", "link set wg0 up",
             "route replace default dev wg0"):
    subprocess.run(["ip", *line.split()], check=True)
nft("table inet marking {{ chain out {{ type route hook output priority -150;"
    "ip daddr 10.65.0.1 udp dport 53 meta mark set 7; }}; }}")
led("ip daddr 10.65.0.1 udp dport 53 dnat ip to 203.0.113.53")
watch = make()
marked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
marked.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)
send("198.51.100.9", 53, question("a.example"), by=marked)  # as the VPN's program does: it may
await ask()
await until(lambda: acted)
say(flows=flows(watch))
""")
    assert seen["flows"] == [["203.0.113.53", 53, 1]]


MARKED = """
for line in ("rule add pref 800 fwmark 7 lookup 100", "route add default via 192.168.7.1 dev eth0 table 100",
             "link add wg0 type veth peer name inside", "link set inside up", "link set wg0 up",
             "route replace default dev wg0"):
    subprocess.run(["ip", *line.split()], check=True)
nft("table inet marking {{ chain out {{ type route hook output priority -150;"
    "udp dport 53 meta mark set 7; }}; }}".replace("{{", "{").replace("}}", "}"))
"""


async def test_a_mark_that_leads_names_past_the_tunnel_is_seen_by_our_own_question() -> None:
    """Policy routing: a VPN's program marks its packets too, but none of them is a question of ours."""
    seen = await ran(f"""{RULES}{MARKED}
watch = make()
await ask("192.0.2.53")  # where no DNS runs: no nameserver to name to people
await ask("1.1.1.1")
await until(lambda: acted)
say(flows=flows(watch), names=[e.name for e in acted])
""")
    assert seen["flows"] == [["1.1.1.1", 53, 1]]
    assert seen["names"] == [None]


async def test_where_a_tap_has_lost_its_router_our_question_is_a_probe_as_ever() -> None:
    """Linux passes over an IPv6 route by a router that does not answer, and takes home's: a leak, and not of names."""
    seen = await ran(f"""{RULES}
for line in ("link add wg0 type veth peer name inside", "link set inside up", "link set wg0 up",
             "addr add fd00:9::2/64 dev wg0 nodad", "-6 route add 2000::/3 via fd00:9::1 dev wg0",
             "addr add 2001:db8:7::2/64 dev eth0 nodad", "-6 route add default via 2001:db8:7::1 dev eth0",
             "neigh add 2001:db8:7::1 lladdr 02:00:00:00:00:01 dev eth0",
             "neigh add fd00:9::1 lladdr 02:00:00:00:00:02 dev wg0"):
    subprocess.run(["ip", *line.split()], check=True)
watch = make()
subprocess.run("ip -6 neigh replace fd00:9::1 dev wg0 nud failed".split(), check=True)
await ask("2606:4700:4700::1111")
left = "2606:4700:4700::1111" in came
send("203.0.113.5"); await until(lambda: "203.0.113.5" in came)  # behind it
say(flows=flows(watch), left=left)
""")
    assert seen["left"]
    assert seen["flows"] == [["203.0.113.5", 443, 1]]


async def test_where_routes_lead_our_question_outside_it_is_a_probe_as_ever() -> None:
    seen = await ran(f"""{RULES}{MARKED}
for network in ("1.1.1.0/24", "203.0.113.0/24"):
    subprocess.run(f"ip route add {{network}} via 192.168.7.1 dev eth0".split(), check=True)
watch = make()
await ask("1.1.1.1")
send("203.0.113.5"); await until(lambda: "203.0.113.5" in came)  # behind it
say(flows=flows(watch))
""")
    assert seen["flows"] == [["203.0.113.5", 443, 1]]


async def test_where_a_rule_leads_the_tunnels_own_address_outside_our_question_is_a_probe_as_ever() -> None:
    """A connected socket has that address (`ip rule add from 10.8.0.2 table main`), and so have connections of TCP."""
    seen = await ran(f"""{RULES}
for line in ("link add wg0 type veth peer name inside", "link set inside up", "link set wg0 up",
             "addr add 10.8.0.2/32 dev wg0", "route replace default dev wg0",
             "rule add pref 800 from 10.8.0.2 lookup 100", "route add default via 192.168.7.1 dev eth0 table 100"):
    subprocess.run(["ip", *line.split()], check=True)
watch = make()
await ask("1.1.1.1")
left = "1.1.1.1" in came
program = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); program.connect(("203.0.113.5", 443)); program.send(b"x")
await until(lambda: "203.0.113.5" in came)  # behind it
say(flows=flows(watch), left=left)
""")
    assert seen["left"]
    assert seen["flows"] == [["203.0.113.5", 443, 1]]


async def test_led_to_a_nameserver_of_the_lan_has_that_one_asked() -> None:
    seen = await ran(f"""{RULES}
watch = make()
led("ip daddr 10.65.0.1 udp dport 53 dnat ip to 192.168.7.1")
await ask()
await until(lambda: asked)
await ask()  # behind it: known now, and the next round asks it
say(asked=asked, flows=flows(watch))
""")
    assert seen["asked"] == ["192.168.7.1%eth0"]
    assert seen["flows"] == []


async def test_over_ipv6_too() -> None:
    seen = await ran(f"""{RULES}
for line in ("addr add 2001:db8:7::2/64 dev eth0 nodad", "-6 route add default via 2001:db8:7::1 dev eth0",
             "neigh add 2001:db8:7::1 lladdr 02:00:00:00:00:01 dev eth0"):
    subprocess.run(["ip", *line.split()], check=True)
watch = make()
led("udp dport 53 dnat ip6 to 2606:4700:4700::1111")
await ask("fd00:65::1")
await until(lambda: acted)
say(flows=flows(watch))
""")
    assert seen["flows"] == [["2606:4700:4700::1111", 53, 1]]


async def test_led_to_this_host_itself_it_never_leaves() -> None:
    """Docker's resolver at 127.0.0.11, and gluetun's own by TLS, work so."""
    seen = await ran(f"""{RULES}
stub = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); stub.bind(("127.0.0.1", 5353)); stub.setblocking(False)
watch = make()
led("udp dport 53 dnat ip to 127.0.0.1:5353")
await ask()
got = len(stub.recv(512))
send("203.0.113.5")  # behind it
await until(lambda: "203.0.113.5" in came)
say(flows=flows(watch), asked=asked, got=got)
""")
    assert seen["flows"] == [["203.0.113.5", 443, 1]]
    assert seen["asked"] == []
    assert seen["got"]


async def test_one_sent_by_a_device_beside_the_tunnel_and_led_elsewhere_there_proves_nothing() -> None:
    """A rule for what leaves by that device alone never meets what goes by the tunnel."""
    seen = await ran(f"""{RULES}
from vpn_sentinel.agent.probes.canary import one
from vpn_sentinel.agent.probes.targets import CLOUDFLARE
from vpn_sentinel.domain.observation import Path, Probe
watch = make()
led('oifname "eth0" udp dport 53 dnat ip to 203.0.113.53')
await one(CLOUDFLARE[0], Path.OUTSIDE, Probe.PHYSICAL, "eth0")
send("203.0.113.5")  # behind it
await until(lambda: "203.0.113.5" in came)
say(flows=flows(watch))
""")
    assert seen["flows"] == [["203.0.113.5", 443, 1]]


async def test_one_that_this_hosts_nat_gave_another_port_is_still_ours() -> None:
    """`MASQUERADE --random-fully`, as gateways have it: the port that the mark was made with is gone."""
    seen = await ran(f"""{RULES}
from vpn_sentinel.agent.probes.canary import one
from vpn_sentinel.agent.probes.targets import CLOUDFLARE
from vpn_sentinel.domain.observation import Path, Probe
nft("table inet nat {{ chain post {{ type nat hook postrouting priority 100; masquerade fully-random; }}; }}")
watch = make()
await one(CLOUDFLARE[0], Path.OUTSIDE, Probe.PHYSICAL, "eth0")
send("203.0.113.5")  # behind it
await until(lambda: "203.0.113.5" in came)
say(flows=flows(watch))
""")
    assert seen["flows"] == [["203.0.113.5", 443, 1]]
