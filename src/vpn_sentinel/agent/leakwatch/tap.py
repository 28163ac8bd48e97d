"""One packet socket on the event loop, filtered in the kernel, read in small portions (packet(7))."""

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

BATCH_PACKETS: Final = 64  # packets read at once; more of them are a flood
FLOOD_PAUSE_S: Final = 0.25  # seconds that a flood is left alone; the kernel goes on counting
_ETH_P_ALL: Final = 0x0003
_SOL_PACKET, _STATISTICS = 263, 6
_BUFFER_BYTES: Final = 64 * 1024
_SIOCGIFHWADDR: Final = 0x8927
_IFREQ: Final = struct.Struct("16sH6s16x")  # netdevice(7): name, ARPHRD_*, hardware address
_ETHER: Final = 1
_NO_TEXT: Final = "\N{REPLACEMENT CHARACTER}"  # in the place of bytes that are no UTF-8


class _Closer:
    """Closes packet sockets in a thread of its own.

    The kernel waits for every processor before it lets go of one (synchronize_net() in net/packet/af_packet.c): 13 ms
    each, and some hundred leave at once where a host's containers end.
    """

    def __init__(self) -> None:
        self._leaving: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self, sock: socket.socket) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # there is no thread to be had
                sock.close()
                return
            self._thread = thread
        self._leaving.put(sock)

    def _run(self) -> None:
        while True:
            self._leaving.get().close()


_CLOSER: Final = _Closer()


class Tap:
    """It takes nothing in before it is bound, so the filter is there before the first packet.

    What leaves an Ethernet device with the address of another one is not this host's: a machine or a container with a
    MACVLAN of its own on this device is a host of the LAN like any other.
    """

    def __init__(
        self,
        interface: str,
        made: list[bpf.Insn],
        packet: Callable[[str, int, bytes, float], None],
        missed: Callable[[int], None] = lambda _: None,
        *,
        pause: float = FLOOD_PAUSE_S,
    ) -> None:
        """`packet` gets the interface's name, the ethertype, the packet, and when it passed by the kernel's clock, in
        seconds; `missed` how many were never read. A flood is left alone for `pause` seconds.

        Raises OSError, PermissionError without CAP_NET_RAW; ValueError for a name that is no text, by which no socket
        can be bound here.
        """
        if _NO_TEXT in interface:
            msg = "its name is no text: give it one in UTF-8 (ip link set … name …)"
            raise ValueError(msg)
        self._packet, self._missed, self._pause = packet, missed, pause
        self._resume: asyncio.TimerHandle | None = None
        self._closed = False
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            enable_timestamps(self._sock)
            self._address = _hardware_address(self._sock, interface)
            self.filter(made)
            self._sock.bind((interface, _ETH_P_ALL))
        except OSError:
            self._sock.close()
            raise
        asyncio.get_running_loop().add_reader(self._sock, self.read)

    @property
    def rests(self) -> bool:
        """Whether it leaves a flood alone at the moment, so that packets wait unread."""
        return self._resume is not None

    def hears(self, interface: str) -> bool:
        """Whether it is bound to the interface of that name, and that has the hardware address that it had.

        The kernel lets go of a socket for good when its interface is removed or leaves this namespace, also when one
        of the same name and number follows (packet_notifier in net/packet/af_packet.c).
        """
        try:
            if self._sock.getsockname()[0] != interface:
                return False
        except UnicodeDecodeError:  # it was given a name that is no text
            return False
        return self._address == _hardware_address(self._sock, interface)

    def filter(self, made: list[bpf.Insn]) -> None:
        """Put the filter in place of the one that is there. Raises OSError."""
        whole = [*bpf.strangers(self._address), *made]
        try:
            bpf.attach(self._sock, whole)
        except OSError as e:
            if e.errno != errno.ENOMEM:
                raise
            # Linux before 6.8 has room for one filter of this size, and not for an old and a new one at a time
            # (net.core.optmem_max, sk_filter_charge() in net/core/filter.c). Nothing comes up for 0.3 ms.
            bpf.attach(self._sock, bpf.NOTHING)
            bpf.attach(self._sock, whole)

    def close(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self._closed = True
        asyncio.get_running_loop().remove_reader(self._sock)
        _CLOSER.close(self._sock)

    def read(self) -> None:
        """Read what has come, one portion at most."""
        if self.rests:
            return
        for _ in range(BATCH_PACKETS):
            try:
                data, told, _flags, (interface, ethertype, *_rest) = self._sock.recvmsg(bpf.SNAP, ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except UnicodeDecodeError:  # the interface has a name that is no text by now
                self._missed(1)
                continue
            except OSError:
                return  # ENETDOWN: the interface went down; the socket hears of it again when it comes up
            self._packet(interface, ethertype, data, packet_time(told))
            if self._closed:
                return  # by what the packet led to
        asyncio.get_running_loop().remove_reader(self._sock)
        self._resume = asyncio.get_running_loop().call_later(self._pause, self._go_on)

    def _go_on(self) -> None:
        self._resume = None
        _taken, dropped = struct.unpack("=II", self._sock.getsockopt(_SOL_PACKET, _STATISTICS, 8))
        self._missed(dropped)
        asyncio.get_running_loop().add_reader(self._sock, self.read)


def _hardware_address(sock: socket.socket, interface: str) -> bytes:
    """The Ethernet address of a device, b"" for one that has none. Raises OSError."""
    told = fcntl.ioctl(sock, _SIOCGIFHWADDR, _IFREQ.pack(interface.encode()[:15], 0, b""))
    _name, kind, address = _IFREQ.unpack(told)
    return bytes(address) if kind == _ETHER else b""
