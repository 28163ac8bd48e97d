"""Up, down, side by side, and gone without a trace when the owner is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lab import Lab, Site, plan, until
from lab.resolvers import Resolver

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root: it makes network namespaces"),
]

REPOSITORY = Path(__file__).parents[2]


def traces(prefix: str) -> list[str]:
    """What is left of a lab: names of namespaces, directories."""
    named = [p.name for p in Path("/run/netns").glob(f"{prefix}-*")]
    return named + [p.name for p in Path(tempfile.gettempdir()).glob(f"{prefix}-lab-*")]


def links() -> set[str]:
    return {line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_up_is_quick_and_down_leaves_nothing() -> None:
    before = links()
    started = time.monotonic()
    lab = Lab([Site("a"), Site("b", vpn="openvpn", provider="ch"), Site("c", provider="us")])
    lab.up()
    took_up = time.monotonic() - started
    process = lab.site("a").spawn(["sleep", "1000"])
    assert links() == before, "no interface of the lab shows up in the root namespace"
    started = time.monotonic()
    lab.down()
    took_down = time.monotonic() - started
    assert took_up < 10
    assert took_down < 3
    assert process.returncode == -signal.SIGKILL
    assert traces(lab.prefix) == []


def test_two_labs_side_by_side() -> None:
    with Lab([Site("a")]) as one, Lab([Site("a")]) as two:
        assert one.prefix != two.prefix
        one.site("a").delete_tunnel()
        assert two.site("a").http("GET", "https://ipinfo.io/json").json()["ip"] == two.site("a").exit4


def test_a_resolver_that_starts_leaves_alone_what_another_one_reads() -> None:
    """Root hints that are written anew are empty for a moment: who reads them then asks the real roots, in vain."""
    with Lab() as lab:
        files = [path for path in (lab.dir / "resolvers").iterdir() if path.is_file()]
        before = {path: path.stat().st_mtime_ns for path in files}
        more = Resolver(lab.srv, "more", listen=[plan.SRV4], egress=plan.SRV4)
        until(lambda: more.ready, 20, "a further resolver")
        assert {path: path.stat().st_mtime_ns for path in files} == before
        for resolver in (*lab.resolvers.values(), more):
            assert "warning" not in resolver.process.output()


def test_owner_killed() -> None:
    code = (
        "from lab import Lab, Site\nimport time\n"
        "lab = Lab([Site('a')])\nlab.up()\n"
        "p = lab.site('a').spawn(['sleep', '1000'])\n"
        "print(lab.prefix, p.pid, flush=True)\ntime.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as owner:
        assert owner.stdout is not None
        prefix, pid = owner.stdout.readline().split()
        assert traces(prefix)
        assert alive(int(pid))
        owner.kill()
    until(lambda: not traces(prefix), 5, "the watcher to clean up")
    assert not alive(int(pid))


def test_a_given_directory_stays(tmp_path: Path) -> None:
    with Lab([Site("a", vpn=None, ipv6="none")], directory=tmp_path) as lab:
        home = lab.site("a")
        assert home.http("GET", "https://ipinfo.io/json").json()["ip"] == home.home4 == home.exit4
        assert home.home6 is None
    assert (tmp_path / "ca.pem").exists()
    assert list((tmp_path / "logs").glob("*.log"))


@pytest.mark.parametrize("vpn", ["wireguard", "openvpn"])
@pytest.mark.parametrize("ipv6", ["tunnel", "outside", "dropped", "none"])
def test_ipv6_options(vpn: str, ipv6: str) -> None:
    with Lab([Site("a", vpn=vpn, ipv6=ipv6, kill_switch=True)]) as lab:
        home = lab.site("a")
        done = home.run(["curl", "-sS", "-m", "1", "https://[2606:4700:4700::1111]/cdn-cgi/trace"])
        wanted = {"tunnel": home.exit6, "outside": home.home6}.get(ipv6)
        if wanted is None:
            assert done.returncode != 0
        else:
            assert f"ip={wanted}\n" in done.stdout
        assert home.http("GET", "https://ipinfo.io/json").json()["ip"] == home.exit4


def test_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example")
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere")
    with Lab() as lab:
        seen = lab.srv.run(["env"], env={"MINE": "1"}).stdout
    assert "PROXY" not in seen
    assert "SSL_CERT_DIR" not in seen
    assert "MINE=1" in seen
    assert f"SSL_CERT_FILE={lab.ca_file}" in seen
