"""WireGuard by the real wg-quick, with a device of any name."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from lab.nodes import Node, until
from lab.plan import Provider
from lab.tunnels import FWMARK, WIREGUARD_PORT, Key, WireGuardServer


class WgQuickClient:
    """`wg-quick up`: it starts wireguard-go, and makes mark, table, rules and its own nftables table."""

    port = WIREGUARD_PORT
    owns_default = False

    def __init__(self, node: Node, provider: Provider, server: WireGuardServer, client: int, *, ipv6: bool,
                 keepalive: int, interface: str) -> None:  # fmt: skip
        self.key, self.interface = Key.new(), interface
        server.prepare(client, self.key, ipv6=ipv6)
        self._node, self._server = node, server
        inner = [f"{provider.inner4('wireguard', client)}/32"]
        if ipv6:
            inner.append(f"{provider.inner6('wireguard', client)}/128")
        directory = node.directory / f"wg-quick-{node.name}"
        directory.mkdir()
        self._config = directory / f"{interface}.conf"
        self._config.touch(mode=0o600)
        self._config.write_text(
            f"""[Interface]
PrivateKey = {self.key.private}
Address = {", ".join(inner)}
MTU = 1420
[Peer]
PublicKey = {server.key.public}
Endpoint = {provider.endpoint}:{self.port}
AllowedIPs = 0.0.0.0/0{", ::/0" if ipv6 else ""}
PersistentKeepalive = {keepalive}
"""
        )

    def up(self) -> None:
        if self._node.has_link(self.interface):
            self._node.ip(f"link set {self.interface} up")
            self._route()
            return
        self._sweep()
        done = self._node.run(
            ["wg-quick", "up", self._config], env={"WG_QUICK_USERSPACE_IMPLEMENTATION": "wireguard-go"}
        )
        if done.returncode != 0:
            raise RuntimeError(f"{self._node.name}: wg-quick ended:\n{done.stderr}")

    def down(self) -> None:
        """The device is deleted; wg-quick's rules stay, as they do for people."""
        if self._node.has_link(self.interface):
            self._node.ip(f"link del {self.interface}", force=True)

    def kill(self) -> None:
        for pid in self._daemons():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self._node.has_link(self.interface), 5, f"{self._node.name}: {self.interface} gone")

    def reconnect(self) -> None:
        """Take the peer out and in again: that drops the session."""
        stripped = self._node.run(["wg-quick", "strip", self._config], check=True).stdout
        file = self._config.with_suffix(".stripped")
        file.touch(mode=0o600)
        file.write_text(stripped.replace("[Interface]", f"[Interface]\nFwMark = {FWMARK}", 1))
        self._node.run(["wg", "setconf", self.interface, file], check=True)

    def admit(self, *, admitted: bool) -> None:
        self._server.admit(self.key, admitted=admitted)

    def _route(self) -> None:
        """A device that was set down lost its routes, and wg-quick does not look again."""
        six = "::/0" in self._config.read_text()
        for family in ("", "-6 ") if six else ("",):
            self._node.ip(f"{family}route replace default dev {self.interface} table {FWMARK}")

    def _sweep(self) -> None:
        """What `wg-quick down` would have taken away, had there been a device left for it to look at."""
        for family in ("", "-6 "):
            self._node.ip(f"{family}rule del not fwmark {FWMARK} table {FWMARK}", force=True)
            self._node.ip(f"{family}rule del table main suppress_prefixlength 0", force=True)
            table = "ip6" if family else "ip"
            self._node.run(["nft", "delete", "table", table, f"wg-quick-{self.interface}"])
        self._node.root(f"/run/wireguard/{self.interface}.sock").unlink(missing_ok=True)

    def _daemons(self) -> list[int]:
        """wireguard-go puts itself into the background, so its PID is looked for: in this node, of this device."""
        own = Path(f"/proc/{self._node.pid}/ns/net").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if words[:2] == [b"wireguard-go", self.interface.encode()] and (entry / "ns/net").readlink() == own:
                    found.append(int(entry.name))
        return found
