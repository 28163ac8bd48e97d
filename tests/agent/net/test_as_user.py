"""Where the tunnel is for one user alone, an agent of another one looks and asks in that user's place."""

import pytest

from tests.agent.leakwatch.test_watch import ran

ONE_USER = """
import os
from ipaddress import ip_address
from vpn_sentinel.agent.rounds.canary_plan import canary_plan
from vpn_sentinel.agent.net.facts import InMemoryFacts
from vpn_sentinel.agent.net.interfaces import Surveyor
from vpn_sentinel.agent.net.as_user import AS_USER
LINES = ["link add wg0 type veth peer name wgfar", "link set wgfar up", "addr add 10.8.0.2/24 dev wg0",
         "link set wg0 up", "route add default dev wg0 table 42"]
RULES = ["rule add uidrange 997-997 lookup 42 pref 42"]
with open("/proc/self/uid_map") as known:
    if known.read().split()[2] == "1":
        RULES = []  # root alone is in this namespace, and the kernel refuses a rule for anybody else
for line in LINES + RULES:
    subprocess.run(["ip", *line.split()], check=True)
kernel.changed()
TO, PROTECTED = ip_address("1.1.1.1"), "10.8.0.2"
def near():
    with AS_USER.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((str(TO), 53))
        return probe.getsockname()[0]
memory = InMemoryFacts()
def look(**options):
    found = Surveyor(kernel, configured="wg0", memory=memory, **options).look()
    AS_USER.switch_to(found.user)
    return found
"""


@pytest.mark.parametrize("options", ["", "only={997}"], ids=["by its rule", "by the owner's word"])
async def test_probes_and_lookups_go_the_way_of_the_user_whom_the_tunnel_is_for(options: str) -> None:
    seen = await ran(
        ONE_USER
        + f"""
before = near()
found = look({options})
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
    other.connect((str(TO), 53))
    after = other.getsockname()[0]
say(before=before, user=found.user, carries=found.carries, path=Paths(kernel, found).of(TO), near=near(), after=after,
    uplinks=[i.name for i in found.uplinks])
""",
        users=True,
    )
    assert seen["before"] == seen["after"] == "192.168.7.2"  # root's own packets go out, as they are meant to
    assert (seen["user"], seen["carries"], seen["path"], seen["near"]) == (997, True, "tunnel", "10.8.0.2")
    assert seen["uplinks"] == ["eth0"]


async def test_a_rule_for_one_user_that_is_left_of_everybodys_tunnel_makes_none_of_that_users() -> None:
    seen = await ran(
        ONE_USER
        + """
subprocess.run("ip rule add pref 43 lookup 42".split(), check=True); kernel.changed()
everybody = look().user
subprocess.run("ip rule del pref 43 lookup 42".split(), check=True); kernel.changed()
left = look()
say(everybody=everybody, left=left.user, path=Paths(kernel, left).of(TO))
""",
        users=True,
    )
    assert (seen["everybody"], seen["left"], seen["path"]) == (None, None, "outside")


async def test_where_it_is_not_permitted_nothing_is_asked_and_that_is_said_once() -> None:
    seen = await ran(  # no user but root is there in this namespace
        ONE_USER
        + """
import logging
logging.basicConfig()
found = look(only={997}); found = look(only={997})
say(user=found.user, refused=AS_USER.refused, near=near(), uid=os.geteuid())
"""
    )
    assert (seen["user"], seen["refused"], seen["near"]) == (997, True, "192.168.7.2")
    assert str(seen["err"]).count("may not send probes as that user") == 1


NOBODYS_PLACE = """
import ctypes
from vpn_sentinel.agent.probes.canary import CanaryPlan
from vpn_sentinel.agent.rounds import round as rounds
from vpn_sentinel.agent.doctor.examine import examine
from vpn_sentinel.agent.doctor.lenient import read_all
from vpn_sentinel.runtime.settings import Source
from vpn_sentinel.agent.probes.place import Places
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import Trigger
from vpn_sentinel.runtime.clock import SystemClock
if {drop}:
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0  # prctl(2): what an ordinary user has
found = look(only={{997}})
deps = rounds.RoundDeps(
    kernel=kernel, survey=lambda: found, plan=lambda _: CanaryPlan(targets=(), reserve=()),
    places=Places(None, (), clock), clock=clock,
)
seen = await rounds.observe(deps, Trigger.TIMER, Policy())
told = [[f.code, f.message, f.advice] for f in judge(seen, Policy()).findings]
settings = {{"VPN_SENTINEL_TUNNEL_INTERFACE": "wg0", "VPN_SENTINEL_MEANT_OUTSIDE": "only user 997"}}
checks = await examine(read_all(Source(settings)), SystemClock())
say(user=seen.refused_user, told=told, checks=[[c.name, c.state, c.found] for c in checks])
"""


async def test_an_agent_that_may_not_ask_in_the_users_place_says_so_in_its_report_and_the_doctor_does() -> None:
    seen = await ran(ONE_USER + NOBODYS_PLACE.format(drop=True), users=True)
    assert seen["user"] == 997
    told, checks = seen["told"], seen["checks"]
    assert isinstance(told, list)
    assert isinstance(checks, list)
    ((code, message, advice),) = told
    assert code == "nothing_seen"
    assert "user 997 alone" in message
    assert advice.startswith("Run the agent as user 997")
    said = {name: (state, found) for name, state, found in checks}
    assert "for user 997 alone" in said["tunnel of one user"][1]
    for name in ("routes", "way out", "kill switch", "resolvers", "system resolver"):
        assert said[name] == ("unknown", "not checked: the tunnel is for one user alone, and not for this one")


async def test_the_doctor_looks_in_the_users_place_as_the_agent_does() -> None:
    seen = await ran(ONE_USER + NOBODYS_PLACE.format(drop=False), users=True)
    assert seen["user"] is None
    checks = seen["checks"]
    assert isinstance(checks, list)
    said = {name: (state, found) for name, state, found in checks}
    assert said["tunnel of one user"] == ("ok", "for user 997 alone")
    assert said["route IPv4"] == ("ok", "by wg0: through the tunnel")
