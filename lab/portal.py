"""A captive portal: sends every page to its login, and speaks TLS with a certificate that is nobody's.

`python -m lab.portal CERT KEY`, inside a home router's node."""

from __future__ import annotations

import ssl
import sys
import threading

from lab.outside.service import Listener, Reply, Request, Service

LOGIN = "http://login.hotspot.test/"


class Portal(Service):
    """302 for everything, an HTML page at the login itself."""

    def answer(self, request: Request) -> Reply:
        if request.host.startswith("login.hotspot.test"):
            return Reply(200, b"<html><title>Welcome to the hotspot</title></html>", kind="text/html")
        return Reply(302, b"<html>Please log in</html>", {"Location": LOGIN}, "text/html")


def main(cert: str, key: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    portal = Portal()
    Listener("::", 8080, portal)  # both families
    Listener("::", 8443, portal, context)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:3])
