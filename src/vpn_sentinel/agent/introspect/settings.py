"""Settings of the sources about the tunnel, in addition to the kernel."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.introspect.gluetun import Login
from vpn_sentinel.agent.net.urls import address_in
from vpn_sentinel.agent.role import NOT_FOR_REFERENCE
from vpn_sentinel.runtime import parsers as p
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import Idle, Section, SettingError, Source, fill

_NO_LOGIN: Final = Login()
_MAX_SOCKET_PATH_BYTES: Final = 107
_EMPTY: Final = Secret("")


def _control(value: str) -> str:
    return p.url(value, login="takes no login: set VPN_SENTINEL_GLUETUN_USER and VPN_SENTINEL_GLUETUN_PASSWORD")


def _user(value: str) -> str:
    if ":" in value or not value.isascii() or not value.isprintable():
        msg = "takes printable ASCII characters without a colon"
        raise ValueError(msg)
    return value


def _management(value: str) -> str:
    """A UNIX socket's path, or an address of the loopback with a port: the protocol is in clear text."""
    if value.startswith("/"):
        if len(os.fsencode(value)) > _MAX_SOCKET_PATH_BYTES:
            msg = f"takes a path of at most {_MAX_SOCKET_PATH_BYTES} bytes (unix(7))"
            raise ValueError(msg)
        mode = p.mode_later(value)
        if mode and not stat.S_ISSOCK(mode):  # OpenVPN may not have created it yet
            msg = f"{value} is no socket"
            raise ValueError(msg)
        return value
    host, _, port = value.rpartition(":")
    address = address_in(host.strip("[]"))
    if address is None or not address.is_loopback:
        msg = f"{value!r} is neither the path of a socket nor an address of the loopback such as 127.0.0.1:7505"
        raise ValueError(msg)
    p.port(port)
    return value


def _port_or_file(value: str) -> int | Path:
    if value.startswith("/"):
        if stat.S_ISDIR(p.mode_later(value)):  # a file that does not exist yet is written later
            msg = f"{value} is a folder"
            raise ValueError(msg)
        return Path(value)
    return p.port(value)


WITNESSES: Final = Section("What the VPN's own programs say", read_by=("agent",))
GLUETUN_URL: Final = WITNESSES.add(
    "GLUETUN_URL",
    _control,
    None,
    "base address of gluetun's control server, such as `http://127.0.0.1:8000`; plain HTTP only on this host and in "
    "private networks, or with `VPN_SENTINEL_ALLOW_INSECURE`. Never used unless it is set; `doctor` reports when one "
    "answers",
    idle=(NOT_FOR_REFERENCE,),
)
_GLUETUN: Final = Idle(needs=("GLUETUN_URL", "REMEDY_GLUETUN_RESTART"))
GLUETUN_API_KEY: Final = WITNESSES.add(
    "GLUETUN_API_KEY",
    p.header,
    _EMPTY,
    "a key whose role may `GET` `/v1/vpn/status`, `/v1/publicip/ip`, `/v1/portforward` and `/v1/dns/status`",
    idle=(_GLUETUN,),
)
GLUETUN_USER: Final = WITNESSES.add(
    "GLUETUN_USER",
    _user,
    "",
    "a user, where gluetun asks for a login instead of a key",
    pair="GLUETUN_PASSWORD",
    idle=(_GLUETUN,),
)
GLUETUN_PASSWORD: Final = WITNESSES.add(
    "GLUETUN_PASSWORD", p.header, _EMPTY, "the user's password", pair="GLUETUN_USER"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntrospectSettings:
    """`openvpn` is a path or ADDRESS:PORT; `forwarded_port` a number, or the file that holds it."""

    openvpn: str | None = WITNESSES.field(
        "OPENVPN_MANAGEMENT",
        _management,
        None,
        "OpenVPN's management interface: the path of its UNIX socket, or `127.0.0.1:PORT`. It serves one client at a "
        "time, and the agent stays connected",
        idle=(NOT_FOR_REFERENCE,),
    )
    openvpn_password: Secret = WITNESSES.field(
        "OPENVPN_MANAGEMENT_PASSWORD",
        p.secret,
        _EMPTY,
        "the password of that interface",
        idle=(Idle(needs=("OPENVPN_MANAGEMENT",)),),
    )
    gluetun: str | None = None
    login: Login = _NO_LOGIN
    forwarded_port: int | Path | None = WITNESSES.field(
        "FORWARDED_PORT",
        _port_or_file,
        None,
        "the port that the VPN forwards here: a number, or the path of a file to which a script writes it",
        default_text="the port that gluetun reports",
        idle=(NOT_FOR_REFERENCE,),
    )

    @classmethod
    def read(cls, source: Source, *, insecure: Callable[[str], bool]) -> "IntrospectSettings":
        """`insecure` says whether a key would be sent in clear to a URL. Raises SettingError naming the setting."""
        gluetun = source.get(GLUETUN_URL)
        login = Login(
            key=source.get(GLUETUN_API_KEY), user=source.get(GLUETUN_USER), password=source.get(GLUETUN_PASSWORD)
        )
        if bool(login.user) is not bool(login.password):
            raise SettingError(GLUETUN_USER.key, f"and {GLUETUN_PASSWORD.key} belong together")
        if gluetun is not None and insecure(gluetun):
            raise SettingError(
                GLUETUN_URL.key,
                "is plain HTTP and neither on this host nor in a private network: VPN_SENTINEL_ALLOW_INSECURE=true "
                "allows it",
            )
        return fill(
            cls,
            source,
            gluetun=gluetun,
            login=login,
        )
