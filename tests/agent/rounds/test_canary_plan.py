"""`check` looks once and reports to nobody: it carries neither the spool nor the uplink."""

import subprocess
import sys

from tests.agent.doubles import ETH, FakeKernel, http, reply
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.net.rtnetlink import Route
from vpn_sentinel.agent.rounds.canary_plan import canary_plan
from vpn_sentinel.agent.settings import ProbeSettings
from vpn_sentinel.domain.observation import Answer
from vpn_sentinel.domain.observation import Path as Way
from vpn_sentinel.runtime.settings import Source


def test_check_loads_no_uplink() -> None:
    code = "import sys, vpn_sentinel.cli.check, vpn_sentinel.agent.once; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "vpn_sentinel.agent.build" in loaded
    assert not loaded & {
        "websockets",
        "sqlite3",
        "vpn_sentinel.agent.app",
        "vpn_sentinel.agent.base",
        "vpn_sentinel.agent.spool",
    }
    assert not any(name.startswith("vpn_sentinel.agent.uplink") for name in loaded)


async def test_an_answer_that_another_tunnel_carried_proves_no_way_outside() -> None:
    """A VPN's program changes its protocol: its new tunnel comes up while the trace is asked."""
    kernel = FakeKernel(routes={"127.0.0.1": Route(interface=ETH.index)})
    paths = Paths(kernel, Survey(interfaces=(ETH,), tunnel="wg0", uplinks=(ETH,), beside=(ETH,)))
    client = Client(names=HostResolver())

    def answer(head: str) -> bytes:
        if "slow" in head:
            kernel.routes["127.0.0.1"] = Route(interface=9)
        return reply("ip=185.65.134.10\n")

    async with http(answer) as (port, _):
        for path, way in (("", Way.OUTSIDE), ("/slow", Way.UNKNOWN)):
            values = {"TRACE_URL": f"http://127.0.0.1:{port}{path}"}
            settings = ProbeSettings.read(Source({f"VPN_SENTINEL_{k}": v for k, v in values.items()}))
            (over,) = canary_plan(settings, client, (), paths).others
            found = await over.ask()
            assert (found.answer, found.path) == (Answer.ANSWERED, way)
