"""Whom the agent may ask about the tunnel, beside what the kernel tells everybody."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.introspect.gluetun import Login
from vpn_sentinel.agent.net.urls import address_in
from vpn_sentinel.runtime import settings as s
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import SettingError, Source

_NO_LOGIN: Final = Login()
_LONGEST_SOCKET: Final = 107  # bytes
_EMPTY: Final = Secret("")


@dataclass(frozen=True, slots=True, kw_only=True)
class IntrospectSettings:
    """`openvpn` is a path or ADDRESS:PORT; `forwarded_port` a number, or the file that holds it."""

    openvpn: str | None = None
    openvpn_password: Secret = _EMPTY
    gluetun: str | None = None
    login: Login = _NO_LOGIN
    forwarded_port: int | Path | None = None

    @classmethod
    def read(cls, source: Source, *, insecure: Callable[[str], bool]) -> "IntrospectSettings":
        """`insecure` tells whether a key may not be sent to an address. Raises SettingError naming the setting."""
        gluetun = source.get("GLUETUN_URL", _control, None)
        login = Login(
            key=source.get("GLUETUN_API_KEY", _credential, _EMPTY),
            user=source.get("GLUETUN_USER", _user, ""),
            password=source.get("GLUETUN_PASSWORD", _credential, _EMPTY),
        )
        if bool(login.user) is not bool(login.password):
            raise SettingError("VPN_SENTINEL_GLUETUN_USER", "and VPN_SENTINEL_GLUETUN_PASSWORD belong together")
        if gluetun is not None and insecure(gluetun):
            raise SettingError(
                "VPN_SENTINEL_GLUETUN_URL",
                "is plain HTTP and neither on this host nor in a private network: VPN_SENTINEL_ALLOW_INSECURE=true "
                "allows it",
            )
        return cls(
            openvpn=source.get("OPENVPN_MANAGEMENT", _management, None),
            openvpn_password=source.get("OPENVPN_MANAGEMENT_PASSWORD", _line, _EMPTY),
            gluetun=gluetun,
            login=login,
            forwarded_port=source.get("FORWARDED_PORT", _port_or_file, None),
        )


def _control(value: str) -> str:
    return s.url(value, login="takes no login: set VPN_SENTINEL_GLUETUN_USER and VPN_SENTINEL_GLUETUN_PASSWORD")


def _credential(value: str) -> Secret:
    """It goes into a header."""
    if not value.isascii() or not value.isprintable():
        msg = "takes printable ASCII characters"
        raise ValueError(msg)
    return Secret(value)


def _line(value: str) -> Secret:
    if not value.isprintable():
        msg = "takes one line of printable characters"
        raise ValueError(msg)
    return Secret(value)


def _user(value: str) -> str:
    if ":" in value or not value.isascii() or not value.isprintable():
        msg = "takes printable ASCII characters without a colon"
        raise ValueError(msg)
    return value


def _management(value: str) -> str:
    """A UNIX socket's path, or an address of the loopback with a port: what is said there is in clear text."""
    if value.startswith("/"):
        if len(os.fsencode(value)) > _LONGEST_SOCKET:
            msg = f"takes a path of at most {_LONGEST_SOCKET} bytes (unix(7))"
            raise ValueError(msg)
        mode = s.mode_later(value)
        if mode and not stat.S_ISSOCK(mode):  # OpenVPN may not have made it yet
            msg = f"{value} is no socket"
            raise ValueError(msg)
        return value
    host, _, port = value.rpartition(":")
    address = address_in(host.strip("[]"))
    if address is None or not address.is_loopback:
        msg = f"{value!r} is neither the path of a socket nor an address of the loopback such as 127.0.0.1:7505"
        raise ValueError(msg)
    s.port(port)
    return value


def _port_or_file(value: str) -> int | Path:
    if value.startswith("/"):
        if stat.S_ISDIR(s.mode_later(value)):  # one that is not there yet is written later
            msg = f"{value} is a folder"
            raise ValueError(msg)
        return Path(value)
    return s.port(value)
