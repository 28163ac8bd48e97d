"""The two ends of a tunnel: a provider's servers, and a home's client. Real wireguard-go, real OpenVPN."""

from __future__ import annotations

import base64
import contextlib
import secrets
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from lab.certs import Authority, Pair
from lab.nodes import Node, Process, until
from lab.plan import KINDS, Provider

FWMARK = 51820
"""Mark of WireGuard's own packets and number of its routing table, as wg-quick chooses them."""


WIREGUARD_PORT = KINDS["wireguard"].outer[0][1]


@dataclass(frozen=True)
class Key:
    """A WireGuard key pair, base64."""

    private: str
    public: str

    @classmethod
    def new(cls) -> Key:
        key = X25519PrivateKey.generate()
        raw, public = key.private_bytes_raw(), key.public_key().public_bytes_raw()
        return cls(base64.b64encode(raw).decode(), base64.b64encode(public).decode())


class Client(Protocol):
    """A home's end of a tunnel. Each method may be called at any time and again."""

    interface: str
    port: int
    """Of the VPN server, where the tunnel's packets go on the home's line."""

    @property
    def owns_default(self) -> bool:
        """Whether it has replaced the host's default route, which then must be left alone."""

    def up(self) -> None:
        """Connect, and return when the interface is there; nothing where it is up."""

    def down(self) -> None:
        """Take the interface away, and with it what an orderly end takes away."""

    def kill(self) -> None:
        """SIGKILL to the program."""

    def reconnect(self) -> None:
        """Begin anew at once, where the protocol itself would wait."""

    def admit(self, *, admitted: bool) -> None:
        """At the provider: let this client in, or throw it out and refuse its return."""


class Server(Protocol):
    """A provider's end."""

    @property
    def ready(self) -> bool: ...
    def start(self) -> None: ...


class WireGuardServer:
    """A provider's WireGuard."""

    ready = True
    """Once `start` has returned."""

    def __init__(self, node: Node, provider: Provider) -> None:
        self.key = Key.new()
        self._node, self._provider = node, provider
        self._peers: dict[str, list[str]] = {}

    def prepare(self, client: int, key: Key, *, ipv6: bool) -> None:
        """Announce a peer that `start` will know."""
        allowed = [f"{self._provider.inner4('wireguard', client)}/32"]
        if ipv6:
            allowed.append(f"{self._provider.inner6('wireguard', client)}/128")
        self._peers[key.public] = allowed

    def start(self) -> None:
        start_wireguard(self._node, "wg0")
        lines = ["[Interface]", f"PrivateKey = {self.key.private}", f"ListenPort = {WIREGUARD_PORT}"]
        for public, allowed in self._peers.items():
            lines += ["[Peer]", f"PublicKey = {public}", f"AllowedIPs = {', '.join(allowed)}"]
        configure_wireguard(self._node, "wg0", lines)
        self._node.ip(
            "link set wg0 mtu 1420 up",
            f"addr add {self._provider.inner4('wireguard', 1)}/24 dev wg0",
            f"addr add {self._provider.inner6('wireguard', 1)}/64 dev wg0 nodad",
        )

    def admit(self, key: Key, *, admitted: bool) -> None:
        """Let a peer in, or forget it."""
        command = ["wg", "set", "wg0", "peer", key.public]
        allowed = self._peers[key.public]
        self._node.run([*command, *(["allowed-ips", ",".join(allowed)] if admitted else ["remove"])], check=True)


class WireGuardClient:
    """A home's WireGuard, routed as wg-quick does: policy routing, so that main's default route takes over
    when the interface is gone.

    `endpoint` is where its packets go, where that is not the provider's usual server. With a `metric` it stands by: its
    default route comes after that of another tunnel, and whose the rules are that is of no matter.
    """

    owns_default = False

    def __init__(self, node: Node, provider: Provider, server: WireGuardServer, client: int, *, ipv6: bool,
                 keepalive: int, endpoint: tuple[str, int] | None = None, interface: str = "wg0",
                 metric: int | None = None) -> None:  # fmt: skip
        self.interface = interface
        self._metric = "" if metric is None else f" metric {metric}"
        self.key = Key.new()
        server.prepare(client, self.key, ipv6=ipv6)
        self._node, self._server = node, server
        address, self.port = endpoint or (provider.endpoint, WIREGUARD_PORT)
        self._addresses = [f"{provider.inner4('wireguard', client)}/32"]
        if ipv6:
            self._addresses.append(f"{provider.inner6('wireguard', client)}/128")
        self._families = ("", "-6 ") if ipv6 else ("",)
        self._config = [
            "[Interface]", f"PrivateKey = {self.key.private}", f"FwMark = {FWMARK}",
            "[Peer]", f"PublicKey = {server.key.public}", f"Endpoint = {address}:{self.port}",
            f"AllowedIPs = 0.0.0.0/0{', ::/0' if ipv6 else ''}", f"PersistentKeepalive = {keepalive}",
        ]  # fmt: skip
        for family in self._families:
            node.ip(
                f"{family}rule add pref 31000 table main suppress_prefixlength 0",
                f"{family}rule add pref 31001 not fwmark {FWMARK} table {FWMARK}",
                force=metric is not None,  # another WireGuard has made them already
            )

    def up(self) -> None:
        device = self.interface
        if not self._node.has_link(device):
            start_wireguard(self._node, device)
            self.reconnect()
        lines = [f"addr replace {address} dev {device} nodad" for address in self._addresses[1:]]
        route = f"route replace default dev {device} table {FWMARK}{self._metric}"
        self._node.ip(
            f"link set {device} mtu 1420 up",
            f"addr replace {self._addresses[0]} dev {device}",
            *lines,
            *(f"{family}{route}" for family in self._families),
        )

    def down(self) -> None:
        if self._node.has_link(self.interface):
            self._node.ip(f"link del {self.interface}", force=True)

    kill = down

    def reconnect(self) -> None:
        """Configure the peer anew: that drops the session, and the next packet starts a handshake."""
        if self._node.has_link(self.interface):
            configure_wireguard(self._node, self.interface, self._config)

    def move(self, server: str) -> None:
        """Send to another address of the server from now on, as roaming and providers' programs do."""
        peer = ["wg", "set", self.interface, "peer", self._server.key.public, "endpoint", f"{server}:{self.port}"]
        self._node.run(peer, check=True)

    def admit(self, *, admitted: bool) -> None:
        self._server.admit(self.key, admitted=admitted)


class OpenVpnServer:
    """A provider's OpenVPN of one kind: over UDP, over TCP with tls-crypt, or with a TAP device."""

    def __init__(self, node: Node, provider: Provider, authority: Authority, kind: str = "openvpn") -> None:
        self._node, self._provider, self._authority, self.kind = node, provider, authority, kind
        self._directory = node.directory / f"{kind}-{provider.name}"
        (self._directory / "ccd").mkdir(parents=True)
        self._clients: dict[str, tuple[int, bool]] = {}
        self._process: Process | None = None
        self.tls_crypt: Path | None = None
        if KINDS[kind].outer[0][0] == "tcp":
            self.tls_crypt = self._directory / "tls-crypt.key"
            self.tls_crypt.touch(mode=0o600)
            self.tls_crypt.write_text(_static_key())

    def prepare(self, name: str, client: int, *, ipv6: bool) -> None:
        """Give a client its fixed inner addresses, and so its exit address."""
        self._clients[name] = (client, ipv6)
        self._write(name, admitted=True)

    def start(self) -> None:
        provider = self._provider
        pair = self._authority.issue(f"{self.kind}-{provider.name}", [provider.endpoint])
        inside4, inside6 = provider.inner4(self.kind, 0), provider.inner6(self.kind, 0)
        config = self._directory / "server.conf"
        protocol, port = KINDS[self.kind].outer[0]
        # UDP on every address, because a tunnel in a tunnel has a server address of its own.
        where = f"proto tcp4-server\nlocal {provider.server(KINDS[self.kind].server)}" if protocol == "tcp" else (
            "proto udp4\nmultihome"
        )  # fmt: skip
        config.write_text(
            f"""mode server
tls-server
{where}
port {port}
dev {self.kind}
dev-type {"tap" if self.kind == "openvpn-tap" else "tun"}
disable-dco
topology subnet
server {inside4} 255.255.255.0
server-ipv6 {inside6}/64
client-config-dir {self._directory / "ccd"}
ccd-exclusive
keepalive 10 60
data-ciphers AES-256-GCM
dh none
ca {self._authority.file}
cert {pair.cert}
key {pair.key}
{f"tls-crypt {self.tls_crypt}" if self.tls_crypt else ""}
{_link(self.kind, 1)}
management /run/openvpn/{self.kind}.sock unix
verb 3
"""
        )
        self._process = self._node.spawn(["openvpn", "--config", config], log=f"{self.kind}-server")

    @property
    def ready(self) -> bool:
        return self._process is not None and _openvpn_is_up(self._process)

    def admit(self, name: str, *, admitted: bool) -> None:
        """Let a client in, or throw it out and refuse its return."""
        self._write(name, admitted=admitted)
        if not admitted:
            with socket.socket(socket.AF_UNIX) as management:
                management.settimeout(5)
                management.connect(str(self._node.root(f"/run/openvpn/{self.kind}.sock")))
                management.sendall(f"kill {name}\nquit\n".encode())
                with contextlib.suppress(OSError):
                    while management.recv(4096):
                        pass

    def _write(self, name: str, *, admitted: bool) -> None:
        client, ipv6 = self._clients[name]
        provider = self._provider
        lines = [f"ifconfig-push {provider.inner4(self.kind, client)} 255.255.255.0"]
        if ipv6:
            lines.append(f"ifconfig-ipv6-push {provider.inner6(self.kind, client)}/64 {provider.inner6(self.kind, 1)}")
        if not admitted:
            lines.append("disable")
        (self._directory / "ccd" / name).write_text("\n".join(lines) + "\n")


class OpenVpnClient:
    """A home's OpenVPN: redirect-gateway def1, persist-tun. Its management socket is /run/openvpn/management.sock.

    `remote` is another address of the server; then the route to it is somebody else's business. `only` is the one
    address that shall go by this tunnel, where it is there to carry another one. `next_server` is another server of its
    list; then its device goes with each connection, because with persist-tun the route to the next one is missing.
    """

    owns_default = False

    def __init__(
        self, node: Node, provider: Provider, server: OpenVpnServer, client: int, *, ipv6: bool,
        authority: Authority, pair: Pair, remote: str | None = None, only: str | None = None,
        next_server: str | None = None,
    ) -> None:  # fmt: skip
        server.prepare(node.name, client, ipv6=ipv6)
        self._node, self._server = node, server
        self._process: Process | None = None
        kind = KINDS[server.kind]
        self.interface = kind.interface
        protocol, self.port = kind.outer[0]
        routes = f"redirect-gateway def1{' local' if remote else ''}{' ipv6' if ipv6 else ''}"
        following = f"remote {next_server} {self.port}\nserver-poll-timeout 3" if next_server else "persist-tun"
        self._config: Path = node.directory / f"openvpn-{node.name}.conf"
        self._config.write_text(
            f"""client
proto {"tcp4-client" if protocol == "tcp" else "udp4"}
remote {remote or provider.server(kind.server)} {self.port}
{following}
nobind
dev {kind.interface}
dev-type {kind.interface.rstrip("0")}
disable-dco
persist-key
{f"route {only} 255.255.255.255" if only else routes}
{"" if ipv6 else 'pull-filter ignore "ifconfig-ipv6"'}
{"" if ipv6 else 'pull-filter ignore "route-ipv6"'}
{"" if ipv6 else 'pull-filter ignore "tun-ipv6"'}
data-ciphers AES-256-GCM
remote-cert-eku "TLS Web Server Authentication"
ca {authority.file}
cert {pair.cert}
key {pair.key}
{f"tls-crypt {server.tls_crypt}" if server.tls_crypt else ""}
connect-retry 1 2
auth-retry nointeract
{_link(server.kind, client + 1)}
management /run/openvpn/management.sock unix
verb 3
"""
        )

    def up(self) -> None:
        if self._process is None or self._process.poll() is not None or not self._node.has_link(self.interface):
            self.kill()
            self._process = self._node.spawn(["openvpn", "--config", self._config], log="openvpn")
            process = self._process
            # The log is appended to: what an earlier process wrote does not count.
            until(lambda: process.poll() is not None or _openvpn_is_up(process), 30, f"{self._node.name}: OpenVPN")
            if process.poll() is not None:
                raise RuntimeError(f"{self._node.name}: OpenVPN ended:\n{process.output()}")

    def down(self) -> None:
        """Without its interface: the client would make a new one by itself, so it goes as well."""
        self.kill()

    def kill(self) -> None:
        """SIGKILL: the kernel takes the interface away with the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.log.write_text("")
            until(lambda: not self._node.has_link(self.interface), 5, f"{self._node.name}: {self.interface} gone")

    def reconnect(self) -> None:
        """A soft restart, which keeps the interface: healing must not open the leak of a missing tunnel."""
        if self._process is not None and self._process.poll() is None and self._node.has_link(self.interface):
            self._process.send_signal(signal.SIGUSR1)
        else:
            self.up()

    def move(self, server: str) -> None:
        """To the next server of its list: the one that it has must have become unreachable."""
        process = self._process
        assert process is not None
        process.log.write_text("")
        process.send_signal(signal.SIGUSR1)
        until(
            lambda: f"link remote: [AF_INET]{server}:" in process.output(),
            20,
            f"{self._node.name}: OpenVPN at {server}",
        )

    def admit(self, *, admitted: bool) -> None:
        self._server.admit(self._node.name, admitted=admitted)


def _static_key() -> str:
    """A static key as `openvpn --genkey` writes it: 2,048 random bits in hexadecimal."""
    digits = secrets.token_hex(256)
    body = "\n".join(digits[n : n + 32] for n in range(0, len(digits), 32))
    return f"-----BEGIN OpenVPN Static key V1-----\n{body}\n-----END OpenVPN Static key V1-----\n"


def _link(kind: str, host: int) -> str:
    """Options that give a TAP device its hardware address and its link-local one.

    The kernel makes the first up anew for each start of a client, and whoever spoke with the one before may keep its
    for half a minute: nothing reaches the new one so long. The second it does not give in the lab (holder.py); without
    one no neighbour can be asked for its hardware address on another's behalf, so that a router forgets its hosts:
    RFC 4861, 7.2.2.
    """
    if KINDS[kind].interface != "tap0":
        return ""
    return (
        f"lladdr 02:00:00:00:{host >> 8:02x}:{host & 255:02x}\n"
        f"script-security 2\nup \"/bin/sh -c 'ip address replace fe80::{host:x}/64 dev $dev nodad'\""
    )


def _openvpn_is_up(process: Process) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"OpenVPN ended:\n{process.output()}")
    return "Initialization Sequence Completed" in process.output()


def start_wireguard(node: Node, interface: str) -> None:
    """Start wireguard-go and wait for its control socket."""
    stale = node.root(f"/run/wireguard/{interface}.sock")
    stale.unlink(missing_ok=True)  # a killed wireguard-go leaves it behind
    env = {"WG_PROCESS_FOREGROUND": "1", "LOG_LEVEL": "error"}
    process = node.spawn(["wireguard-go", interface], env=env, log="wireguard")

    def ready() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{node.name}: wireguard-go ended:\n{process.output()}")
        return stale.exists() and node.has_link(interface) and listens(stale)

    until(ready, 10, f"{node.name}: wireguard-go")


def listens(path: Path) -> bool:
    """Whether somebody takes connections there: the file exists a moment before."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def configure_wireguard(node: Node, interface: str, lines: list[str]) -> None:
    """wg setconf, from a file that only root reads."""
    file = node.directory / f"{node.name}-{interface}.conf"
    file.touch(mode=0o600)
    file.write_text("\n".join(lines) + "\n")
    node.run(["wg", "setconf", interface, file], check=True)
