"""Somebody else's traffic in a tunnel: what a download does to a line, or one program's packets past the tunnel."""

import sys
from typing import Any

from lab.home import Home
from lab.nodes import Node, Process

PORT = 9009
_SOURCE = f"""
import socket, threading
def pour(peer):
    try:
        while True:
            peer.sendall(bytes(65536))
    except OSError:
        pass
with socket.create_server(("0.0.0.0", {PORT}), reuse_port=True) as door:
    while True:
        threading.Thread(target=pour, args=(door.accept()[0],), daemon=True).start()
"""
_DRAIN = """
import socket, sys, time
address, port, bytes_a_second, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
end, taken, began = time.monotonic() + seconds, 0, time.monotonic()
with socket.create_connection((address, port), 10) as source:
    source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    while time.monotonic() < end:
        taken += len(source.recv(16384))
        ahead = taken / bytes_a_second - (time.monotonic() - began)
        if bytes_a_second and ahead > 0:
            time.sleep(min(ahead, end - time.monotonic()) if end > time.monotonic() else 0)
"""


def fountain(node: Node) -> Process:
    """A server that pours zeros into every connection, as fast as the line takes them."""
    running = node.spawn([sys.executable, "-c", _SOURCE], log="fountain")
    node.wait_port(PORT)
    return running


def download(site: Home, server: str, *, kbit: float, seconds: float) -> Any:
    """Take at most `kbit` from the fountain for so long; `kbit` beyond what the line carries fills it."""
    words = [server, str(PORT), str(kbit * 125), str(seconds)]
    return site.spawn([sys.executable, "-c", _DRAIN, *words], log="download")


def call_out(site: Home, address: str, *, device: str = "", dscp: int = 0) -> None:
    """A program on the host sends a few packets to an address, and does not care for an answer.

    Its socket is bound to the `device`, where one is named, and sends with this DSCP (RFC 2474).
    """
    code = (
        "import socket, sys, time\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, sys.argv[2].encode())\n"
        "s.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, int(sys.argv[3]) << 2)\n"
        "for _ in range(5):\n"
        "    s.sendto(b'hello', (sys.argv[1], 6881)); time.sleep(0.02)\n"
    )
    site.run([sys.executable, "-c", code, address, device, str(dscp)], check=True)
