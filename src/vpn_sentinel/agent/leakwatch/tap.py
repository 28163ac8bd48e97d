"""One packet socket on the event loop, filtered in the kernel, read in small batches (packet(7))."""

import asyncio
import errno
import fcntl
import queue
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final

from vpn_sentinel.agent.leakwatch import bpf
from vpn_sentinel.agent.net.packettime import ANCILLARY_BYTES, enable_timestamps, packet_time

BATCH_PACKETS: Final = 64  # read at once; more that wait are a flood
FLOOD_PAUSE_S: Final = 0.25  # a flood stays unread so long; the kernel counts what it drops
_ETH_P_ALL: Final = 0x0003
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_BUFFER_BYTES: Final = 64 * 1024
_SIOCGIFHWADDR: Final = 0x8927
_IFREQ: Final = struct.Struct("16sH6s16x")  # netdevice(7): name, ARPHRD_*, hardware address
_ARPHRD_ETHER: Final = 1
_UNDECODABLE: Final = "\ufffd"  # U+FFFD, in place of bytes that are not UTF-8; \N{…} would load unicodedata


class _Closer:
    """Closes packet sockets in a thread of its own.

    The kernel waits for every processor before it releases one (synchronize_net() in net/packet/af_packet.c): 13 ms
    each, and some hundred are closed at once when a host's containers stop.
    """

    def __init__(self) -> None:
        self._leaving: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self, sock: socket.socket) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread can be started
                sock.close()
                return
            self._thread = thread
        self._leaving.put(sock)

    def _run(self) -> None:
        while True:
            self._leaving.get().close()


_CLOSER: Final = _Closer()


class Tap:
    """It receives nothing before it is bound, so the filter is in place before the first packet.

    A packet that leaves an Ethernet device with another source address is not this host's: a machine or a container
    with a MACVLAN of its own on this device is a host of the LAN like any other.
    """

    def __init__(
        self,
        interface: str,
        insns: list[bpf.Insn],
        on_packet: Callable[[str, int, bytes, float], None],
        on_missed: Callable[[int], None] = lambda _: None,
        *,
        pause: float = FLOOD_PAUSE_S,
    ) -> None:
        """`on_packet` gets the interface's name, the ethertype, the packet, and when it passed by the kernel's clock in
        seconds; `on_missed` how many packets were dropped unread. A flood stays unread for `pause` seconds.

        Raises OSError, PermissionError without CAP_NET_RAW; ValueError for a name that is not UTF-8, since Python can
        bind no socket to it.
        """
        if _UNDECODABLE in interface:
            msg = "its name is no text: give it one in UTF-8 (ip link set … name …)"
            raise ValueError(msg)
        self._on_packet, self._on_missed, self._pause = on_packet, on_missed, pause
        self._resume: asyncio.TimerHandle | None = None
        self._closed = False
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            enable_timestamps(self._sock)
            self._address = _hardware_address(self._sock, interface)
            self.filter(insns)
            self._sock.bind((interface, _ETH_P_ALL))
        except OSError:
            self._sock.close()
            raise
        asyncio.get_running_loop().add_reader(self._sock, self.read)

    @property
    def is_paused(self) -> bool:
        """Whether it leaves a flood unread at the moment."""
        return self._resume is not None

    def is_bound_to(self, interface: str) -> bool:
        """Whether it is bound to the interface of that name, and that still has the same hardware address.

        The kernel unbinds a socket for good when its interface is removed or leaves this namespace, also when another
        one takes its name and index (packet_notifier in net/packet/af_packet.c).
        """
        try:
            if self._sock.getsockname()[0] != interface:
                return False
        except UnicodeDecodeError:  # its name is not UTF-8 any more
            return False
        return self._address == _hardware_address(self._sock, interface)

    def filter(self, insns: list[bpf.Insn]) -> None:
        """Replace the filter. Raises OSError."""
        full = [*bpf.drop_other_sources(self._address), *insns]
        try:
            bpf.attach(self._sock, full)
        except OSError as e:
            if e.errno != errno.ENOMEM:
                raise
            # Linux before 6.8 has room for one filter of this size, and not for the old and the new one together
            # (net.core.optmem_max, sk_filter_charge() in net/core/filter.c). Packets of 0.3 ms are lost.
            bpf.attach(self._sock, bpf.DROP_ALL)
            bpf.attach(self._sock, full)

    def close(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self._closed = True
        asyncio.get_running_loop().remove_reader(self._sock)
        _CLOSER.close(self._sock)

    def read(self) -> None:
        """Read what waits, one batch at most."""
        if self.is_paused:
            return
        for _ in range(BATCH_PACKETS):
            try:
                received = self._sock.recvmsg(bpf.MAX_CAPTURE_BYTES, ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except UnicodeDecodeError:  # the interface's name is not UTF-8 any more
                self._on_missed(1)
                continue
            except OSError:
                return  # ENETDOWN: the interface is down; the socket works again when it comes up
            data, ancillary, _flags, (interface, ethertype, *_rest) = received
            self._on_packet(interface, ethertype, data, packet_time(ancillary))
            if self._closed:
                return  # by the handler
        asyncio.get_running_loop().remove_reader(self._sock)
        self._resume = asyncio.get_running_loop().call_later(self._pause, self._go_on)

    def _go_on(self) -> None:
        self._resume = None
        _taken, dropped = struct.unpack("=II", self._sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self._on_missed(dropped)
        asyncio.get_running_loop().add_reader(self._sock, self.read)


def _hardware_address(sock: socket.socket, interface: str) -> bytes:
    """The 6 bytes of a device's Ethernet address, b"" for a device of another type. Raises OSError."""
    ancillary = fcntl.ioctl(sock, _SIOCGIFHWADDR, _IFREQ.pack(interface.encode()[:15], 0, b""))
    _name, hardware_type, address = _IFREQ.unpack(ancillary)
    return bytes(address) if hardware_type == _ARPHRD_ETHER else b""
