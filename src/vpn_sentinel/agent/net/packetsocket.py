"""Whether this process may open a packet socket (packet(7)), which the leak watch needs."""

import socket


def packet_socket() -> str | None:
    """None when one can be opened, else the reason why not."""
    try:
        # Protocol 0: it receives nothing.
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0).close()
    except OSError as e:
        return e.strerror or "refused"
    return None
