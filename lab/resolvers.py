"""Recursive resolvers: unbound, each with its own egress address, below the lab's own root."""

from __future__ import annotations

from collections.abc import Sequence

from lab.nodes import Node, Process
from lab.plan import GOOGLE_NS, ROOT_SERVER

_CONFIG = """
server:
  username: ""
  chroot: ""
  pidfile: ""
  directory: "{directory}"
  use-syslog: no
  logfile: ""
  verbosity: 1
  num-threads: 1
  do-daemonize: no
  {interfaces}
  port: {port}
  outgoing-interface: {egress}
  access-control: 0.0.0.0/0 allow
  access-control: ::/0 allow
  module-config: "{modules}"
  root-hints: "{hints}"
  local-zone: "test." nodefault
  do-not-query-localhost: no
  hide-identity: yes
  # A dead authoritative server is asked again at once after it was healed, not 15 minutes later.
  infra-host-ttl: 1
  infra-keep-probing: yes
  cache-max-negative-ttl: 1
  target-fetch-policy: "0 0 0 0 0"
  qname-minimisation: yes
  {extra}
remote-control:
  control-enable: yes
  control-use-cert: no
  control-interface: "{socket}"
"""


class Resolver:
    """One unbound."""

    def __init__(
        self, node: Node, name: str, *, listen: Sequence[str], egress: str, port: int = 53, ecs: bool = False
    ) -> None:
        self.egress = egress
        self._node = node
        directory = node.directory / "resolvers"
        directory.mkdir(exist_ok=True)
        # One for each resolver: another one that writes it anew would empty it for a moment, and unbound, which finds
        # no root in it, takes the real ones.
        hints = directory / f"{name}.hints"
        hints.write_text(f". 3600000 NS a.root-servers.net.\na.root-servers.net. 3600000 A {ROOT_SERVER}\n")
        self._socket = directory / f"{name}.sock"
        self._config = directory / f"{name}.conf"
        self._config.write_text(
            _CONFIG.format(
                directory=directory,
                interfaces="\n  ".join(f"interface: {address}" for address in listen),
                port=port,
                egress=egress,
                modules="subnetcache iterator" if ecs else "iterator",
                hints=hints,
                extra=f"send-client-subnet: {GOOGLE_NS}/32" if ecs else "",
                socket=self._socket,
            )
        )
        self._name = name
        self._refused: frozenset[str] = frozenset()
        self.process = self._start()

    def _start(self) -> Process:
        return self._node.spawn(["unbound", "-d", "-c", self._config], log=f"unbound-{self._name}")

    @property
    def ready(self) -> bool:
        """It listens; a process that ended is an error, not a reason to wait."""
        if self.process.poll() is not None:
            raise RuntimeError(f"unbound {self._name} ended:\n{self.process.output()}")
        return self._socket.exists() and "start of service" in self.process.output()

    def refuse(self, names: frozenset[str]) -> None:
        """Answer REFUSED for exactly these names (and what is below them)."""
        for name in names - self._refused:
            self._control("local_zone", name, "always_refuse")
        for name in self._refused - names:
            self._control("local_zone_remove", name)
        self._refused = names

    def flush(self) -> None:
        """Forget every cached answer."""
        self._control("flush_zone", ".")

    def _control(self, *words: str) -> None:
        self._node.run(["unbound-control", "-c", str(self._config), *words], check=True)
