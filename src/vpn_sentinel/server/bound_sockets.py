"""The sockets of all ports, bound before anything else starts."""

import socket
from dataclasses import dataclass

from vpn_sentinel.runtime.settings import PREFIX
from vpn_sentinel.server.serving import listen
from vpn_sentinel.server.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class BoundSockets:
    """Bound before anything else starts, so that a busy port is one line of error, and nothing has to be undone."""

    api: socket.socket
    echo: socket.socket
    health: socket.socket
    dashboard: socket.socket | None
    canary: tuple[socket.socket, ...] = ()

    @classmethod
    def bind(cls, settings: ServerSettings) -> "BoundSockets":
        """Raises SettingError that names the setting of the port or address that cannot be used."""
        bound: list[socket.socket] = []

        def take(host: str, port: int, name: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
            hosts = {"SERVER_API_PORT": "SERVER_HOST"}.get(name, name.replace("_PORT", "_HOST"))
            # There is no setting for the dashboard's address.
            host_setting = "" if name == "SERVER_DASHBOARD_PORT" else PREFIX + hosts
            bound.append(listen(host, port, PREFIX + name, kind, host_setting=host_setting))
            return bound[-1]

        try:
            api = take(settings.host, settings.api_port, "SERVER_API_PORT")
            echo = take(settings.host, settings.api_port, "SERVER_API_PORT", socket.SOCK_DGRAM)
            health = take(settings.health_host, settings.health_port, "SERVER_HEALTH_PORT")
            dashboard = None
            if settings.dashboard_enabled:
                dashboard = take(settings.dashboard_host, settings.dashboard_port, "SERVER_DASHBOARD_PORT")
            canary: tuple[socket.socket, ...] = ()
            if (zone := settings.canary) is not None:
                kinds = (socket.SOCK_DGRAM, socket.SOCK_STREAM)
                canary = tuple(take(host, zone.port, "CANARY_PORT", kind) for host in zone.hosts for kind in kinds)
        except BaseException:
            for sock in bound:
                sock.close()
            raise
        return cls(api, echo, health, dashboard, canary)

    def close(self) -> None:
        for sock in (self.api, self.echo, self.health, self.dashboard, *self.canary):
            if sock is not None:
                sock.close()
