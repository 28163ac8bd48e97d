"""The agent as a process, in a network namespace with nothing but the loopback."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from vpn_sentinel.agent.build import chosen_services
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.probes.echoes import Echoes
from vpn_sentinel.agent.settings import ProbeSettings
from vpn_sentinel.runtime.settings import Source
from vpn_sentinel.wire.messages import Echo

ALONE = ["unshare", "--user", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


async def start(tmp_path: Path, settings: Mapping[str, str]) -> asyncio.subprocess.Process:
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "VPN_SENTINEL_DATA_DIR": str(tmp_path), **settings}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    return await asyncio.create_subprocess_exec(
        *ALONE, sys.executable, "-m", "vpn_sentinel", "agent", env=env, stderr=asyncio.subprocess.PIPE
    )


LEAST = {"VPN_SENTINEL_URL": "http://127.0.0.1:9", "VPN_SENTINEL_API_KEY": "k", "VPN_SENTINEL_TUNNEL_INTERFACE": "wg0"}


async def test_it_starts_looks_keeps_and_stops_at_once(tmp_path: Path) -> None:
    agent = await start(tmp_path, LEAST)
    assert agent.stderr is not None
    lines: list[str] = []
    async with asyncio.timeout(15):
        while not any("verdict" in line for line in lines):
            lines.append((await agent.stderr.readline()).decode())
            assert lines[-1], lines
        began = time.perf_counter()
        agent.send_signal(signal.SIGTERM)
        rest = (await agent.stderr.read()).decode()
        assert await agent.wait() == 0
    assert time.perf_counter() - began < 1.0
    assert any("codes=orphaned_namespace" in line for line in lines)
    assert "agent stopped" in rest
    assert "Traceback" not in rest
    assert any("agent-" in name for name in await asyncio.to_thread(os.listdir, tmp_path))


CANNOT = {
    "no key": ({"VPN_SENTINEL_API_KEY": ""}, "VPN_SENTINEL_API_KEY: is not set"),
    "a bad interval": ({"VPN_SENTINEL_INTERVAL": "x"}, "VPN_SENTINEL_INTERVAL: "),
    "a log that cannot be opened": ({"VPN_SENTINEL_LOG_FILE": "/nonexistent/x"}, "VPN_SENTINEL_LOG_FILE: "),
    "an address of someone else's": ({"VPN_SENTINEL_HEALTH_HOST": "192.0.2.1"}, "VPN_SENTINEL_HEALTH_HOST: "),
    "an address of a link": (
        {"VPN_SENTINEL_HEALTH_HOST": "fe80::1"},
        "VPN_SENTINEL_HEALTH_HOST: cannot listen on fe80",
    ),
}


@pytest.mark.parametrize(("settings", "line"), CANNOT.values(), ids=CANNOT.keys())
async def test_what_cannot_be_used_stops_the_start_with_one_line(
    tmp_path: Path, settings: dict[str, str], line: str
) -> None:
    agent = await start(tmp_path, {**LEAST, **settings})
    async with asyncio.timeout(15):
        _, err = await agent.communicate()
    assert agent.returncode == 1
    (last,) = [said for said in err.decode().splitlines() if "VPN_SENTINEL_" in said]
    assert line in last
    assert b"Traceback" not in err


def test_the_echo_is_asked_at_public_addresses_once_a_family() -> None:
    echoes = Echoes(HostResolver(), ("192.168.1.5", "65.108.77.20", "65.108.77.21", "2a01:4f9::1"))
    echoes.greet(Echo(port=5000, id="00" * 8, key="11" * 32))
    assert [str(t.address) for t in echoes.targets] == ["65.108.77.20", "2a01:4f9::1"]
    echoes.greet(None)
    assert echoes.targets == ()


def test_one_service_may_be_chosen() -> None:
    def names(service: str) -> list[str]:
        settings = ProbeSettings.read(Source({"VPN_SENTINEL_GEOLOCATION_SERVICE": service}))
        return [s.name for s in chosen_services(settings)]

    assert names("auto") == ["ipinfo.io", "ipwho.is", "ip-api.com", "cloudflare"]
    assert names("ip-api.com") == ["ip-api.com", "cloudflare"]
