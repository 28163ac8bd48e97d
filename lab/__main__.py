"""`python -m lab up|status|shell NODE`: a lab with three tunnels to look around in."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from lab import Lab, Site, plan

DEFAULT = [
    Site("anna", vpn="wireguard", provider="nl", kill_switch=True, lan_server=True, reference=True),
    Site("ben", vpn="openvpn", provider="ch", kill_switch=False),
    Site("cleo", vpn="wireguard", provider="us", kill_switch=False),
]


def up() -> int:
    """Bring the default lab up, say where everything is, and wait for Ctrl-C."""
    started = time.monotonic()
    with Lab(DEFAULT) as lab:
        print(f"lab {lab.prefix} is up after {time.monotonic() - started:.1f} s; files in {lab.dir}")
        print(f"  server     {plan.SRV_NAME}  {plan.SRV4}  {plan.SRV6}   certificate {lab.server_cert.cert}")
        print(f"  CA         {lab.ca_file}\n  database   {lab.mmdb}")
        for home in lab.homes.values():
            kill_switch = "kill switch" if home.site.kill_switch else "no kill switch"
            tunnel = f"{home.site.vpn} ({home.vpn_interface}) to {home.site.provider}, {kill_switch}"
            print(f"  {home.name:<10} {tunnel}")
            print(f"             home {home.home4} {home.home6}  exit {home.exit4} {home.exit6}")
        print(f"Look around:  {sys.executable} -m lab shell anna     (Ctrl-C takes the lab down)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


def status() -> int:
    """Every lab that is up on this machine."""
    for facts in _running():
        print(f"{facts['prefix']}  owner {facts['owner']}  nodes {' '.join(facts['nodes'])}")
        for name, site in facts["sites"].items():
            print(f"  {name:<10} {site['vpn']}  home {site['home4']}  exit {site['exit4']} {site['exit6'] or ''}")
    return 0


def shell(node: str, command: list[str]) -> NoReturn:
    """A shell (or one command) in a node of the lab that came up last."""
    labs = [facts for facts in _running() if node in facts["nodes"]]
    if not labs:
        sys.exit(f"no running lab has a node {node}")
    facts = labs[-1]
    pid = facts["nodes"][node]
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "TERM", "LANG") if key in os.environ}
    environment |= {"SSL_CERT_FILE": facts["ca_file"], "PS1": f"{node}# "}
    enter = ["nsenter", f"--net=/proc/{pid}/ns/net", f"--mount=/proc/{pid}/ns/mnt", "--wdns=."]
    os.execvpe("nsenter", [*enter, "--", *(command or ["bash", "--norc"])], environment)


def _running() -> list[dict[str, Any]]:
    found = sorted(Path(tempfile.gettempdir()).glob("vs*-lab-*/lab.json"), key=lambda file: file.stat().st_mtime)
    return [json.loads(file.read_text()) for file in found]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help=up.__doc__)
    commands.add_parser("status", help=status.__doc__)
    inside = commands.add_parser("shell", help=shell.__doc__)
    inside.add_argument("node")
    inside.add_argument("argv", nargs="*")
    arguments = parser.parse_args()
    match arguments.command:
        case "up":
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            return up()
        case "status":
            return status()
        case _:
            shell(arguments.node, arguments.argv)


if __name__ == "__main__":
    sys.exit(main())
