"""OpenConnect against ocserv: TLS on TCP 443, DTLS beside it, and the routes of vpnc-script.

The script makes a host route to the server and *replaces* the default route. An orderly end puts the old one back; a
killed client leaves the host with the host route and no default at all.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import subprocess
from pathlib import Path

from lab.certs import Authority
from lab.nodes import Node, Process, until
from lab.plan import KINDS, Provider

_SCRIPT = "/usr/share/vpnc-scripts/vpnc-script"
_KIND = KINDS["openconnect"]


class OcservServer:
    """A provider's ocserv. Users and passwords are in a file that it reads at each login."""

    def __init__(self, node: Node, provider: Provider, authority: Authority) -> None:
        self._node, self.provider, self.authority = node, provider, authority
        self._directory = node.directory / f"ocserv-{provider.name}"
        (self._directory / "users").mkdir(parents=True)
        self._passwords = self._directory / "passwd"
        self._passwords.touch()
        self._process: Process | None = None

    def prepare(self, name: str, client: int) -> str:
        """Give a client its fixed addresses; returns its password."""
        provider, password = self.provider, secrets.token_hex(8)
        (self._directory / "users" / name).write_text(
            f"explicit-ipv4 = {provider.inner4('openconnect', client)}\n"
            f"explicit-ipv6 = {provider.inner6('openconnect', client)}\n"
        )
        subprocess.run(
            ["ocpasswd", "-c", self._passwords, name], input=f"{password}\n{password}\n", text=True, check=True,
            capture_output=True,
        )  # fmt: skip
        return password

    def start(self) -> None:
        provider = self.provider
        address = provider.server(_KIND.server)
        pair = self.authority.issue(f"ocserv-{provider.name}", [address])
        config = self._directory / "ocserv.conf"
        config.write_text(
            f"""auth = "plain[passwd={self._passwords}]"
listen-host = {address}
tcp-port = 443
udp-port = 443
run-as-user = root
run-as-group = root
socket-file = /run/ocserv.sock
use-occtl = true
occtl-socket-file = /run/occtl.sock
pid-file = /run/ocserv.pid
server-cert = {pair.cert}
server-key = {pair.key}
isolate-workers = false
max-ban-score = 0
keepalive = 300
dpd = 20
cookie-timeout = 300
device = vpns
ipv4-network = {provider.inner4("openconnect", 0)}/24
ipv6-network = {provider.inner6("openconnect", 0)}/64
ipv6-subnet-prefix = 128
ping-leases = false
dtls-legacy = false
config-per-user = {self._directory / "users"}
route = default
"""
        )
        self._process = self._node.spawn(["ocserv", "-f", "-c", config], log="ocserv")
        self._node.wait_port(443)

    @property
    def ready(self) -> bool:
        return self._process is not None and self._process.poll() is None and self._node.listens(443)

    def admit(self, name: str, *, admitted: bool) -> None:
        """Unlock the account, or lock it and end its session."""
        subprocess.run(["ocpasswd", "-c", self._passwords, "-u" if admitted else "-l", name], check=True)
        if not admitted:
            self._node.run(["occtl", "-s", "/run/occtl.sock", "disconnect", "user", name])


class OpenConnectClient:
    """A home's openconnect."""

    interface = _KIND.interface
    port = _KIND.outer[0][1]
    owns_default = True

    def __init__(self, node: Node, server: OcservServer, client: int, *, ipv6: bool, default: str) -> None:
        """`default`: `via … dev …`, the host's way out without the tunnel, which an earlier kill may have lost."""
        self._node, self._server, self._default = node, server, default
        secret: Path = node.directory / f"openconnect-{node.name}.secret"
        secret.touch(mode=0o600)
        secret.write_text(server.prepare(node.name, client) + "\n")
        words = [
            "openconnect", "--protocol=anyconnect", f"--user={node.name}", "--passwd-on-stdin", "--non-inter",
            f"--cafile={server.authority.file}", f"--interface={self.interface}", f"--script={_SCRIPT}",
            "--reconnect-timeout=3600", *([] if ipv6 else ["--disable-ipv6"]), server.provider.server(_KIND.server),
        ]  # fmt: skip
        self._command = f"exec {' '.join(words)} < {secret}"
        self._process: Process | None = None

    def up(self) -> None:
        if self._process is not None and self._process.poll() is None and self._node.has_link(self.interface):
            return
        self.kill()
        self._node.ip(f"route replace default {self._default}")
        process = self._process = self._node.spawn(["sh", "-c", self._command], log="openconnect")

        def connected() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"{self._node.name}: openconnect ended:\n{process.output()}")
            return self._has_default()

        until(connected, 30, f"{self._node.name}: openconnect")

    def down(self) -> None:
        """An orderly end: the script takes its routes away and puts the old default route back."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.log.write_text("")
            until(lambda: not self._node.has_link(self.interface), 5, f"{self._node.name}: {self.interface} gone")

    def reconnect(self) -> None:
        if self._process is not None and self._process.poll() is None and self._node.has_link(self.interface):
            self._process.send_signal(signal.SIGUSR2)
        else:
            self.up()

    def admit(self, *, admitted: bool) -> None:
        self._server.admit(self._node.name, admitted=admitted)

    def _has_default(self) -> bool:
        routes = Path(f"/proc/{self._node.pid}/net/route").read_text().splitlines()[1:]
        return any(fields[:2] == [self.interface, "00000000"] for fields in map(str.split, routes))
