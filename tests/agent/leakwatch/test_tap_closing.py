"""The kernel takes its time to let go of a packet socket: nothing else waits for that."""

import socket
import threading

import pytest

from vpn_sentinel.agent.leakwatch import tap


class Slow:
    """A socket that the kernel lets go of when the test says so."""

    def __init__(self) -> None:
        self.may, self.closed = threading.Event(), threading.Event()

    def close(self) -> None:
        assert self.may.wait(10)
        self.closed.set()


def test_who_closes_does_not_wait_for_the_kernel() -> None:
    closer, socks = tap._Closer(), [Slow() for _ in range(3)]
    for sock in socks:
        closer.close(sock)  # type: ignore[arg-type]
    assert not any(sock.closed.is_set() for sock in socks)
    for sock in socks:
        sock.may.set()
        assert sock.closed.wait(10)


def test_where_no_thread_is_to_be_had_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_thread: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    monkeypatch.setattr(threading.Thread, "start", none)
    sock = socket.socket()
    tap._Closer().close(sock)
    assert sock.fileno() == -1
