"""`python -m lab.ppp NETNS NAME HERE`: a point-to-point line between two namespaces, as PPPoE makes one.

NETNS is the other end's namespace as a path, NAME the device there, HERE the device in the namespace that this runs
in. Both are TUN devices, because a kernel without PPP has nothing else without neighbours; packets are carried between
them by hand. Source: Documentation/networking/tuntap.rst.
"""

import ctypes
import fcntl
import os
import selectors
import struct
import sys
from pathlib import Path

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_LARGEST = 65535


def _device(name: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return tun


def _enter(namespace: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with namespace.open("rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def _carry(source: int, sink: int) -> None:
    try:
        while True:
            os.write(sink, os.read(source, _LARGEST))
    except BlockingIOError:
        return  # nothing more to read, or a full queue, which loses the packet
    except OSError:
        return  # one end is down: the packet is lost


def main(there: Path, name: str, here: str) -> None:
    near = _device(here)
    _enter(there)
    far = _device(name)
    with selectors.DefaultSelector() as ready:
        ready.register(near, selectors.EVENT_READ, far)
        ready.register(far, selectors.EVENT_READ, near)
        while True:
            for key, _ in ready.select():
                _carry(key.fd, key.data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
