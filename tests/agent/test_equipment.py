"""`check` looks once and reports to nobody: it carries neither the spool nor the uplink."""

import subprocess
import sys


def test_check_loads_no_uplink() -> None:
    code = "import sys, vpn_sentinel.cli.check, vpn_sentinel.agent.once; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "vpn_sentinel.agent.equipment" in loaded
    assert not loaded & {"websockets", "sqlite3", "vpn_sentinel.agent.app", "vpn_sentinel.agent.spool"}
    assert not any(name.startswith("vpn_sentinel.agent.uplink") for name in loaded)
