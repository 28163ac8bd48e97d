"""strongSwan: IKEv2, and ESP in UDP by its own kernel-libipsec, which needs no help from the kernel but a TUN device.

Routes are in table 220, which a rule names for everything but IKE's own packets (mark 0x42).
"""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path

from lab.nodes import Node, Process, until
from lab.plan import KINDS, Provider

_KIND = KINDS["strongswan"]
_VICI = "unix:///run/charon.vici"
_DAEMON = """charon {
  load_modular = no
  load = random nonce aes sha1 sha2 hmac kdf gcm curve25519 openssl kernel-libipsec kernel-netlink socket-default vici
  install_virtual_ip = yes
  retransmit_timeout = 1
  retransmit_tries = 3
  plugins {
    vici { socket = unix:///run/charon.vici }
    kernel-netlink { fwmark = !0x42 }
    socket-default { fwmark = 0x42 }
    kernel-libipsec { allow_peer_ts = yes }
  }
  filelog { stderr { default = 1 } }
}
charon-systemd { journal { default = -1 } }
"""


class _Charon:
    """One daemon, spoken to by swanctl."""

    def __init__(self, node: Node, log: str) -> None:
        self._node, self._log = node, log
        self._daemon = node.directory / f"strongswan-{node.name}.conf"
        self._daemon.write_text(_DAEMON)
        self._file: Path = node.directory / f"swanctl-{node.name}.conf"
        self._file.touch(mode=0o600)
        self.process: Process | None = None

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        process = self.process = self._node.spawn(
            ["charon-systemd"], env={"STRONGSWAN_CONF": str(self._daemon)}, log=self._log
        )

        def listens() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"{self._node.name}: charon ended:\n{process.output()}")
            return self.control("--stats").returncode == 0

        until(listens, 15, f"{self._node.name}: charon", interval=0.05)

    def load(self, text: str) -> None:
        self._file.write_text(text)
        done = self.control("--load-all", "--file", str(self._file))
        if done.returncode != 0:
            raise RuntimeError(f"{self._node.name}: swanctl: {done.stderr}{done.stdout}")

    def control(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self._node.run(["swanctl", *words, "--uri", _VICI], env={"STRONGSWAN_CONF": str(self._daemon)})

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._node.root("/run/charon.vici").unlink(missing_ok=True)


class StrongswanServer:
    """A provider's charon, with a connection and a pool of one address for each client."""

    def __init__(self, node: Node, provider: Provider) -> None:
        self._node, self.provider = node, provider
        self._charon = _Charon(node, "charon-server")
        self._clients: dict[str, tuple[int, str]] = {}
        self._refused: set[str] = set()

    @property
    def name(self) -> str:
        return f"{self.provider.name}.vpn.test"

    def prepare(self, name: str, client: int) -> str:
        """Give a client its fixed addresses; returns its shared secret."""
        secret = secrets.token_hex(16)
        self._clients[name] = client, secret
        return secret

    def start(self) -> None:
        self._node.ip(f"addr add {self.provider.inner4('strongswan', 1)}/32 dev lo")
        self._charon.start()
        self._load()

    @property
    def ready(self) -> bool:
        return self._charon.runs

    def admit(self, name: str, *, admitted: bool) -> None:
        self._refused = self._refused - {name} if admitted else self._refused | {name}
        self._load()
        if not admitted:
            self._charon.control("--terminate", "--ike", name, "--force")

    def _load(self) -> None:
        connections, pools, keys = [], [], []
        for name, (client, secret) in self._clients.items():
            inner4, inner6 = (self.provider.inner4("strongswan", client), self.provider.inner6("strongswan", client))
            pools.append(f"{name}4 {{ addrs = {inner4}/32 }}\n{name}6 {{ addrs = {inner6}/128 }}")
            keys.append(f'ike-{name} {{ id-1 = {self.name}\nid-2 = {name}\nsecret = "{secret}" }}')
            if name not in self._refused:
                connections.append(
                    f"""{name} {{
  version = 2
  local_addrs = {self.provider.server(_KIND.server)}
  pools = {name}4, {name}6
  dpd_delay = 20s
  local {{ auth = psk
    id = {self.name} }}
  remote {{ auth = psk
    id = {name} }}
  children {{ net {{ local_ts = 0.0.0.0/0, ::/0 }} }}
}}"""
                )
        blocks = (("connections", connections), ("pools", pools), ("secrets", keys))
        self._charon.load("\n".join(f"{title} {{\n{chr(10).join(body)}\n}}" for title, body in blocks))


class StrongswanClient:
    """A home's charon."""

    interface = _KIND.interface
    port = _KIND.outer[-1][1]
    owns_default = False

    def __init__(self, node: Node, server: StrongswanServer, client: int, *, ipv6: bool, lan: str) -> None:
        self._node, self._server = node, server
        self._charon = _Charon(node, "charon")
        secret = server.prepare(node.name, client)
        six = ", ::/0" if ipv6 else ""
        self._connections = f"""connections {{ vpn {{
  version = 2
  remote_addrs = {server.provider.server(_KIND.server)}
  vips = 0.0.0.0{", ::" if ipv6 else ""}
  encap = yes
  dpd_delay = 10s
  keyingtries = 0
  local {{ auth = psk
    id = {node.name} }}
  remote {{ auth = psk
    id = {server.name} }}
  children {{ net {{ remote_ts = 0.0.0.0/0{six}
    dpd_action = restart
    close_action = start }} }}
}} }}
secrets {{ ike-vpn {{ id-1 = {node.name}
  id-2 = {server.name}
  secret = "{secret}" }} }}
"""
        node.ip(f"rule add pref 200 to {lan} table main")  # as the plugin bypass-lan has it

    def up(self) -> None:
        if self._charon.runs and self._node.has_link(self.interface):
            return
        self.kill()
        self._charon.start()
        self._charon.load(self._connections)
        self._initiate()

    def down(self) -> None:
        self.kill()

    def kill(self) -> None:
        self._charon.kill()
        until(lambda: not self._node.has_link(self.interface), 5, f"{self._node.name}: {self.interface} gone")

    def reconnect(self) -> None:
        if not self._charon.runs:
            self.up()
            return
        self._charon.control("--terminate", "--ike", "vpn", "--force")
        self._initiate()

    def admit(self, *, admitted: bool) -> None:
        self._server.admit(self._node.name, admitted=admitted)

    def _initiate(self) -> None:
        done = self._charon.control("--initiate", "--child", "net", "--timeout", "10")
        if done.returncode != 0:
            raise RuntimeError(f"{self._node.name}: swanctl: {done.stdout}{done.stderr}")
