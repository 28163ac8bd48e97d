"""Run all stand-ins: `python -m lab.outside <lab directory>`, inside node `svc`. Wiring only."""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

from lab.outside import dns
from lab.outside.control import serve
from lab.outside.places import IpApi, IpInfo, IpWhoIs, Mullvad, Trace
from lab.outside.service import Listener, Service
from lab.outside.sinks import Mail, SmtpListener, Webhook
from lab.outside.telegram import Telegram
from lab.plan import HOSTS

UPSTREAM = ("127.0.0.1", 5353)
"""The recursive resolver behind 1.1.1.1."""


def main(directory: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "outside.pem", directory / "outside.key")

    mail, log = Mail(), dns.DnsLog()
    web: dict[str, tuple[Service, tuple[str, ...]]] = {
        "ipinfo": (IpInfo(), ("ipinfo.io", "v6.ipinfo.io", "api.ipinfo.io")),
        "ipapi": (IpApi(), ("ip-api.com",)),
        "ipwhois": (IpWhoIs(), ("ipwho.is",)),
        "mullvad": (Mullvad(), ("ipv4.am.i.mullvad.net", "ipv6.am.i.mullvad.net")),
        "trace": (Trace(), ("one.one.one.one",)),
        "telegram": (Telegram(), ("api.telegram.org",)),
        "webhook": (Webhook(), ("hooks.test",)),
    }
    for service, hosts in web.values():
        for address in (a for host in hosts for a in HOSTS[host] if a):
            Listener(address, 80, service)
            if not isinstance(service, IpApi):  # its free tier refuses HTTPS
                Listener(address, 443, service, context)
    for address in (a for a in HOSTS["mail.test"] if a):
        for port in (25, 587):
            SmtpListener(address, port, mail)
    authority, front = dns.Authority(log), dns.CloudflareFront(UPSTREAM)
    for address in dns.authoritative_addresses():
        dns.serve(authority, address)
    for address in dns.FRONT_ADDRESSES:
        dns.serve(front, address)

    services: dict[str, Service] = {name: service for name, (service, _) in web.items()} | {"mail": mail, "dns": log}
    serve(directory / "control.sock", services)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
