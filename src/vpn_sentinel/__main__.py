"""`python -m vpn_sentinel`."""

from vpn_sentinel.cli.main import run

run()
