"""The leak watch on real tunnels: the packet itself is the proof, and a healthy tunnel under load proves nothing.

Each line reads as a timeline: the fault and the traffic at 0 s, then what the server must say by when.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lab import Lab, Site, until
from tests.acceptance.stand import Stand

pytestmark = pytest.mark.acceptance

Stands = dict[str, Stand]
# One for each leak, so that none waits for the end of another.
SITES = {
    "watched": {"kill_switch": False},
    "split": {"kill_switch": False},
    "asking": {"kill_switch": False},
    "closing": {"kill_switch": True},
}
ELSEWHERE = "5.9.10.20"  # an address of the lab's internet that no canary of ours asks
ASKED = "8.8.8.8"
CHECK = [sys.executable, "-m", "vpn_sentinel", "check"]
SINK = 5999
MEBIBIT = 131072  # bytes
SEND = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(int(sys.argv[3])):
    sock.sendto(b"nobody should see this", (sys.argv[1], int(sys.argv[2])))
"""
TAKE = """
import socket, sys
with socket.create_server(("0.0.0.0", int(sys.argv[1]))) as server:
    while True:
        got = server.accept()[0]
        while got.recv(1 << 20):
            pass
"""
FILL = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as sock:
    begin, sent, block = time.monotonic(), 0, bytes(65536)
    while time.monotonic() - begin < float(sys.argv[3]):
        if sent > (time.monotonic() - begin) * 100e6 / 8:
            time.sleep(0.002)
            continue
        sock.sendall(block)
        sent += len(block)
print(sent)
"""


@pytest.fixture(scope="module", params=["wireguard", "openvpn"])
def stands(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stands]:
    with ExitStack() as ends:
        sites = [Site(name, vpn=request.param, provider="nl", **options) for name, options in SITES.items()]  # type: ignore[arg-type]
        lab = ends.enter_context(Lab(sites))
        made = {}
        for number, name in enumerate(SITES):
            made[name] = Stand(lab, name, number, tmp_path_factory.mktemp("leaks"))
            ends.callback(made[name].stop)
            made[name].start_server()
        for stand in made.values():
            stand.start_agent()
        lab.srv.spawn([sys.executable, "-c", TAKE, str(SINK)], log="sink")
        lab.srv.wait_port(SINK, 5)
        for stand in made.values():
            stand.wait_state("protected", 30)
            stand.wait_message("protected", 0, 10)
            until(lambda stand=stand: watching(stand), 10, f"{stand.name}: the leak watch to be on")
        yield made
        for stand in made.values():
            assert "Traceback" not in stand.agent.output(), stand.agent.output()[-4000:]


def watching(stand: Stand) -> bool:
    found = stand.observations(time.time() - 60, time.time() + 60)
    return any(o["body"].get("leak_watch") for o in found)


def send(stand: Stand, to: str, port: int, packets: int = 1) -> None:
    stand.site.run([sys.executable, "-c", SEND, to, str(port), str(packets)], timeout=30)


def escapes(stand: Stand, since: float) -> list[dict[str, Any]]:
    found = stand.observations(since, time.time() + 60)
    return [e for o in found for e in o["body"].get("escapes", [])]


def finding(stand: Stand, code: str) -> dict[str, Any]:
    return next(f for f in stand.status()["findings"] if f["code"] == code)


def leaks(stand: Stand, what: str, traffic: Callable[[], object], code: str, limit: float = 1.5) -> dict[str, Any]:
    """`traffic` leaves outside: within `limit` seconds the server says *leaking* with `code`. Returns the finding."""
    began = time.time()
    traffic()
    sent = time.time()
    until(
        lambda: stand.status().get("state") == "leaking" and code in stand.codes(),
        limit + sent - began,
        f"{stand.name} to be leaking with {code}; it is {stand.status()}",
        interval=0.02,
    )
    at = next(m for m in reversed(stand.history()) if m["new"] == "leaking")
    print(
        f"{what}: traffic from {began:.3f} to +{sent - began:.3f} s; leaking dated "
        f"{stand.seconds(at['at']) - began:+.3f} s, seen in the API at {time.time() - began:+.3f} s"
    )
    return finding(stand, code)


def test_row_27_any_destination_outside_is_seen_by_its_packet(stands: Stands) -> None:
    stand = stands["split"]
    stand.settle()
    stand.site.split_route(ELSEWHERE)
    leaks(stand, "row 27", lambda: send(stand, ELSEWHERE, 4444), "split_route")
    # The route may be told before its packet, which waits for 0.2 s where the routes have just been read.
    until(
        lambda: "destination" in finding(stand, "split_route")["evidence"],
        1.5,
        "the packet to be named",
        interval=0.02,
    )
    facts = finding(stand, "split_route")["evidence"]
    assert facts["destination"] == f"{ELSEWHERE}:4444"
    assert facts["source"].startswith(f"{stand.site.lan4}:")
    assert (facts["protocol"], facts["interface"], facts["seen_by"]) == ("udp", "eth0", "leak watch")
    assert "ip_leak" not in stand.codes()


def test_row_15_the_name_asked_outside_is_told(stands: Stands) -> None:
    stand = stands["asking"]
    stand.settle()
    stand.site.split_route(ASKED)
    ask = ["dig", "+short", "+tries=1", "+time=1", f"@{ASKED}", "private.probe.test"]
    began = time.time()
    found = leaks(stand, "row 15", lambda: stand.site.run(ask, timeout=5), "dns_leak")
    assert found["evidence"]["destination"] == f"{ASKED}:53"
    assert "private.probe.test" in {e.get("name") for e in escapes(stand, began)}


def test_row_29_a_leak_that_a_kill_switch_ends_is_kept(stands: Stands) -> None:
    stand = stands["closing"]
    stand.settle()
    before = stand.agent.log.stat().st_size
    began = time.time()
    stand.site.set_kill_switch(False)
    stand.site.delete_tunnel()
    send(stand, ELSEWHERE, 4444, 3)
    stand.site.set_kill_switch(True)
    print(f"row 29: open for {time.time() - began:.2f} s")
    # What left at such a moment is told by what stands when it is judged, up to half a second later.
    until(lambda: b"state=leaking" in stand.agent.log.read_bytes()[before:], 20, "the agent to have seen the leak")
    stand.settle()

    def moves() -> list[dict[str, Any]]:
        return [m for m in stand.history() if stand.seconds(m["at"]) > began - 1]

    # Closed in again, the agent told of it when the tunnel was back: the server may not have heard of trouble before.
    until(lambda: any(m["new"] == "leaking" for m in moves()), 20, "the leak that is over to be told")
    until(lambda: moves()[-1]["new"] == "protected", 30, "the tunnel to be protected again")
    leak = next(m for m in moves() if m["new"] == "leaking")
    print(f"row 29: leaking dated {stand.seconds(leak['at']) - began:+.3f} s")
    # A change keeps what was found first: by the packet, by a pulse, or by whichever family's canary was back before.
    assert {"ip_leak", "ipv6_leak"} & {f["code"] for m in moves() for f in m["findings"]}
    assert any(e["destination"] == ELSEWHERE and e["packets"] == 3 for e in escapes(stand, began))


def woken(stand: Stand) -> tuple[int, float]:
    """How often the agent woke up so far, and the seconds of CPU it took."""
    proc = Path(f"/proc/{stand.agent.pid}")
    lines = (proc / "status").read_text().splitlines()
    waits = sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    words = (proc / "stat").read_text().rpartition(")")[2].split()
    return waits, (int(words[11]) + int(words[12])) / 100


def test_a_healthy_tunnel_under_load_wakes_nobody(stands: Stands) -> None:
    stand = stands["watched"]
    before = stand.settle()
    began, (idle, cpu_idle) = time.time(), woken(stand)
    time.sleep(4)
    quiet, cpu_quiet = woken(stand)
    sent = int(stand.site.run([sys.executable, "-c", FILL, stand.lab.server4, str(SINK), "4"], timeout=20).stdout)
    busy, cpu_busy = woken(stand)
    print(
        f"load: {sent * 8 / 4e6:.0f} Mbit/s; wakes {quiet - idle} idle, {busy - quiet} under load; "
        f"CPU {cpu_quiet - cpu_idle:.2f} s idle, {cpu_busy - cpu_quiet:.2f} s under load"
    )
    assert sent > 20 * MEBIBIT
    assert busy - quiet < 3 * (quiet - idle) + 100  # some tens of thousands of packets went by
    assert not escapes(stand, began)
    assert len(stand.messages()) == before


def test_a_tunnel_that_connects_anew_leaks_nothing(stands: Stands) -> None:
    stand = stands["watched"]
    before = stand.settle()
    began = time.time()
    client = stand.site.client
    assert client is not None
    client.reconnect()
    stand.site.wait_up()
    if stand.site.vpn_interface == "wg0":
        roam(stand)
    time.sleep(3)
    assert not escapes(stand, began), escapes(stand, began)
    assert "leaking" not in [m["new"] for m in stand.history() if stand.seconds(m["at"]) > began]
    assert not [m for m in stand.messages()[before:] if "leak" in m["plain"].lower()]


def roam(stand: Stand) -> None:
    """The provider's other address answers too: the peer moves there, as a client that changes its server does."""
    stand.site.run(["sh", "-c", "wg set wg0 peer $(wg show wg0 peers) endpoint 185.65.134.53:51820"], check=True)
    stand.site.run(["ping", "-c", "2", "-W", "1", stand.site.gateway4], timeout=10)


def test_check_says_that_it_watches(stands: Stands) -> None:
    stand = stands["watched"]
    before, began = stand.settle(), time.time()
    checked = stand.site.run(CHECK, env={"VPN_SENTINEL_GEO_DB": str(stand.lab.mmdb)}, timeout=30)
    assert next(line for line in checked.stdout.splitlines() if "leak watch" in line).split() == ["leak", "watch", "on"]
    # Its canaries beside the tunnel are no leak to the agent, which runs in the same namespace.
    assert not escapes(stand, began)
    stand.quiet(before, 2)


def test_a_flood_outside_is_counted_and_costs_little(stands: Stands) -> None:
    stand = stands["watched"]
    stand.settle()
    stand.site.split_route(ELSEWHERE)
    began, (_, cpu) = time.time(), woken(stand)
    send(stand, ELSEWHERE, 4444, 200_000)
    took = time.time() - began
    until(
        lambda: max((e["packets"] for e in escapes(stand, began)), default=0) >= 190_000,
        15,
        "the flood to be counted",
        interval=0.2,
    )
    used = woken(stand)[1] - cpu
    print(f"flood: {200_000 / took:.0f} packets/s for {took:.1f} s; the agent took {used:.2f} s of CPU until it told")
    assert used < 1.0


def test_check_sees_what_leaves_while_it_looks(stands: Stands) -> None:
    stand = stands["watched"]
    stand.site.split_route(ELSEWHERE)
    traffic = stand.site.spawn(["ping", "-q", "-i", "0.05", ELSEWHERE], log="ping")
    checked = stand.site.run([*CHECK, "--json"], env={"VPN_SENTINEL_GEO_DB": str(stand.lab.mmdb)}, timeout=30)
    traffic.stop()
    assert checked.returncode == 2, checked.stdout
    told = json.loads(checked.stdout)
    facts = next(f for f in told["findings"] if f["code"] == "split_route")["evidence"]
    assert (facts["destination"], facts["protocol"]) == (ELSEWHERE, "icmp")
