"""A tunnel that another one carries, and a tunnel inside a TCP connection of this host."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lab.nodes import Node, Process, import_path
from lab.plan import KINDS, Provider
from lab.tunnels import WIREGUARD_PORT, Client, WireGuardClient

NEAR = ("127.0.0.1", 51821)
"""Where the relay on the host takes WireGuard's packets."""


class NestedClient:
    """Two tunnels, the outer one first; `routes` are what an owner of such a set-up adds by hand once it stands.

    `down` and `kill` end both: with the outer one alone, nothing would leave from home.
    """

    owns_default = False

    def __init__(
        self, node: Node, outer: Client, inner: Client, *, before: Sequence[str], between: Sequence[str]
    ) -> None:
        self._node, self.outer, self.inner = node, outer, inner
        self.interface, self.port = inner.interface, outer.port
        self._before, self._between = before, between

    def up(self) -> None:
        self._node.ip(*self._before)
        self.outer.up()
        self._node.ip(*self._between)
        self.inner.up()

    def down(self) -> None:
        self.inner.down()
        self.outer.down()

    def kill(self) -> None:
        self.inner.kill()
        self.outer.kill()

    def reconnect(self) -> None:
        self.outer.reconnect()
        self._node.ip(*self._between)
        self.inner.reconnect()

    def admit(self, *, admitted: bool) -> None:
        self.inner.admit(admitted=admitted)


class RelayServer:
    """The far end of the TCP wrapper, on the provider."""

    ready = True

    def __init__(self, node: Node, provider: Provider) -> None:
        self._node, self._provider = node, provider

    def start(self) -> None:
        kind = KINDS["wireguard-tcp"]
        port = kind.outer[0][1]
        words = ["server", self._provider.server(kind.server), str(port), self._provider.endpoint, str(WIREGUARD_PORT)]
        self._node.spawn([sys.executable, "-m", "lab.stream_relay", *words], env=import_path(), log="relay-server")
        self._node.wait_port(port)


class WrappedClient:
    """WireGuard whose endpoint is 127.0.0.1: what really leaves is a program's TCP connection to the provider."""

    interface = "wg0"
    owns_default = False

    def __init__(self, node: Node, provider: Provider, wireguard: WireGuardClient, route: str) -> None:
        """`route`: `via … dev …` to the provider beside the tunnel, which the relay's packets need."""
        kind = KINDS["wireguard-tcp"]
        self.port = kind.outer[0][1]
        self._node, self._wireguard = node, wireguard
        self._far = provider.server(kind.server)
        self._route = f"route replace {self._far} {route}"
        self._relay: Process | None = None

    def up(self) -> None:
        self._node.ip(self._route)
        if self._relay is None or self._relay.poll() is not None:
            words = ["client", NEAR[0], str(NEAR[1]), self._far, str(self.port)]
            command = [sys.executable, "-m", "lab.stream_relay", *words]
            self._relay = self._node.spawn(command, env=import_path(), log="relay")
            self._node.wait_port(NEAR[1], protocol="udp")
        self._wireguard.up()

    def down(self) -> None:
        self._wireguard.down()

    kill = down

    def reconnect(self) -> None:
        if self._relay is not None:
            self._relay.stop()
        self.up()
        self._wireguard.reconnect()

    def admit(self, *, admitted: bool) -> None:
        self._wireguard.admit(admitted=admitted)
