"""Databases of a few networks, and servers that hand them out: HTTP and HTTPS on the loopback."""

import gzip
import hashlib
import io
import ssl
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

from mmdb_writer import MMDBWriter
from netaddr import IPSet

NOW = 1_800_000_000.0  # 2027-01-15
DAY = 86400.0


def mmdb(
    path: Path, kind: str, *, country: str = "NL", asn: int = 39351, built: float = NOW - 5 * DAY, version: int = 6
) -> bytes:
    """Write a database: of places, of networks when `kind` says ASN, of both for the type "both"."""
    place = {
        "country": {"iso_code": country},
        "city": {"names": {"en": "Amsterdam"}},
        "subdivisions": [{"names": {"en": "North Holland"}}],
        "location": {"time_zone": "Europe/Amsterdam"},
    }
    network = {"autonomous_system_number": asn, "autonomous_system_organization": "31173 Services AB"}
    writer = MMDBWriter(version, ipv4_compatible=version == 6, database_type=kind, description="A test's")
    record = {**place, **network} if kind == "both" else network if "ASN" in kind else place
    writer.insert_network(IPSet(["185.65.134.0/24"]), record)
    if version == 6:
        writer.insert_network(IPSet(["2a03:1b20:3::/48"]), record)
    with mock.patch("mmdb_writer.time.time", return_value=built):  # the library takes no other clock
        writer.to_db_file(str(path))
    return path.read_bytes()


def tar_gz(name: str, data: bytes) -> bytes:
    """As MaxMind packs it: a folder with texts and the database."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for member, content in ((f"{name}_20270112/LICENSE.txt", b"words"), (f"{name}_20270112/{name}.mmdb", data)):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


class Server:
    """Answers paths (with their query) with bytes, a status, or a status with headers; remembers who asked with what.

    `cut` bytes are left out at the end of every body, though its length counts them.
    """

    def __init__(self, port: int, scheme: str) -> None:
        self.base = f"{scheme}://127.0.0.1:{port}"
        self.files: dict[str, bytes | int | tuple[int, dict[str, str]]] = {}
        self.got: list[tuple[str, str | None]] = []
        self.cut = 0
        self.hold: threading.Event | None = None

    def paths(self) -> list[str]:
        return [path for path, _ in self.got]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.got.append((request.path, request.headers.get("Authorization")))
        found = self.files.get(request.path, 404)
        status, headers = found if isinstance(found, tuple) else (found if isinstance(found, int) else 200, {})
        body = found if isinstance(found, bytes) else b"<html>a page</html>"
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if self.hold is not None:
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            self.hold.wait(20)
            return
        request.wfile.write(body[: len(body) - self.cut])

    def dbip(self, folder: Path, month: str = "2027-01", **facts: object) -> None:
        """Offer both parts of DB-IP Lite."""
        city = mmdb(folder / "c.mmdb", "DBIP-City-Lite", **facts)  # type: ignore[arg-type]
        asn = mmdb(folder / "a.mmdb", "DBIP-ASN-Lite (compat=GeoLite2-ASN)", **facts)  # type: ignore[arg-type]
        self.files[f"/free/dbip-city-lite-{month}.mmdb.gz"] = gzip.compress(city)
        self.files[f"/free/dbip-asn-lite-{month}.mmdb.gz"] = gzip.compress(asn)

    def maxmind(self, folder: Path, storage: "Server", **facts: object) -> None:
        """Offer both editions behind the permalink, which redirects to a signed address of `storage`."""
        for edition in ("GeoLite2-City", "GeoLite2-ASN"):
            data = tar_gz(edition, mmdb(folder / f"{edition}.mmdb", edition, **facts))  # type: ignore[arg-type]
            permalink = f"/geoip/databases/{edition}/download?suffix=tar.gz"
            signed = f"/bucket/{edition}.tar.gz?X-Amz-Signature=s1gned"
            self.files[permalink] = (302, {"Location": storage.base + signed})
            self.files[permalink + ".sha256"] = f"{hashlib.sha256(data).hexdigest()}  {edition}.tar.gz\n".encode()
            storage.files[signed] = data


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                served.answer(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *_: object) -> None: ...

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None: ...  # a client that hangs up

    server = Quiet(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    served = Server(server.server_address[1], "http" if tls is None else "https")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        if served.hold is not None:
            served.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()
