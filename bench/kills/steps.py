"""A process that can be killed just before any of its steps: a system call that leaves something behind.

That is one that writes, sends, makes, cuts, renames or removes, whichever thread makes it, on a file or on a socket to
somebody else. It waits in the kernel until a thread here has counted it (SECCOMP_RET_USER_NOTIF, seccomp_unotify(2)).
strace(1) can send a signal at the n-th call too, but counts those of each thread apart. What goes to standard error is
no step, nor what wakes a thread of the same process (eventfd, pipes). Stores into mapped memory, as SQLite's index of
its log has them, are no calls; they are done or not with the call that follows.

x86-64 and Linux 5.19 or newer. Layouts: linux/seccomp.h, linux/filter.h; numbers: asm/unistd_64.h.
"""

import ctypes
import errno
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

CALLS: Final = {
    1: "write", 18: "pwrite64", 20: "writev", 40: "sendfile", 44: "sendto", 46: "sendmsg", 74: "fsync",
    75: "fdatasync", 76: "truncate", 77: "ftruncate", 82: "rename", 83: "mkdir", 84: "rmdir", 86: "link", 87: "unlink",
    88: "symlink", 90: "chmod", 91: "fchmod", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 265: "linkat",
    266: "symlinkat", 268: "fchmodat", 285: "fallocate", 296: "pwritev", 307: "sendmmsg", 316: "renameat2",
    326: "copy_file_range",
}  # fmt: skip
_OPEN, _OPENAT = 2, 257  # steps where they may make the file
_BY_HANDLE: Final = {1, 18, 20, 44, 46, 74, 75, 77, 91, 285, 296, 307}
_STDERR: Final = 2
_LISTENER: Final = 100  # the number under which the process hands its listener over
_PR_SET_NO_NEW_PRIVS, _SECCOMP, _PIDFD_GETFD = 38, 317, 438
_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE = 1, 1 << 3, 1 << 5
_RECEIVE, _ANSWER = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV and _SEND
_CONTINUE: Final = 1
_MADE_UP: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z|[0-9a-f]{16}")  # parts of names that differ from run to run
_CALL: Final = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
_REPLY: Final = struct.Struct("=QqiI")  # struct seccomp_notif_resp

_libc = ctypes.CDLL(None, use_errno=True)


def _filter() -> bytes:
    """The program that has these calls wait, and lets all others pass."""
    load, equal, has, jump, end = 0x20, 0x15, 0x45, 0x05, 0x06
    allow, wait, count = 0x7FFF0000, 0x7FC00000, len(CALLS)
    program = [
        (load, 0, 0, 0),  # the number
        *((equal, count + 6 - at, 0, number) for at, number in enumerate(CALLS)),
        (equal, 2, 0, _OPEN),
        (equal, 3, 0, _OPENAT),
        (end, 0, 0, allow),
        (load, 0, 0, 24),  # open's second word
        (jump, 0, 0, 1),
        (load, 0, 0, 32),  # openat's third
        (has, 0, 1, os.O_CREAT),
        (end, 0, 0, wait),
        (end, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in program)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))


_LINES: Final = ctypes.create_string_buffer(_filter())
_PROGRAM: Final = _Program(len(_filter()) // 8, ctypes.addressof(_LINES))


def _wait_at_steps() -> None:
    """In the process that is to be, before it becomes another program. Raises OSError."""
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    flags = _NEW_LISTENER | _WAIT_KILLABLE
    listener = _libc.syscall(_SECCOMP, _SET_MODE_FILTER, flags, ctypes.byref(_PROGRAM))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    os.dup2(listener, _LISTENER)


class Stepped:
    """Runs a program, its output into `out` and its log into `log`, and keeps its steps, in words."""

    def __init__(
        self, words: Sequence[str], env: Mapping[str, str], out: Path, log: Path, *, kill_at: int | None = None
    ) -> None:
        """`kill_at`: see the method, from its first step on. Raises OSError where the kernel cannot do this."""
        self.steps: list[str] = []
        self.killed = False
        self._last = kill_at or 0  # the number of the step that it does not take; 0 for none
        with out.open("ab") as stdout, log.open("ab") as stderr:
            self.process = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                preexec_fn=_wait_at_steps, close_fds=False,
            )  # fmt: skip
        there = os.pidfd_open(self.process.pid)
        self._listener = _libc.syscall(_PIDFD_GETFD, there, _LISTENER, 0)
        os.close(there)
        if self._listener < 0:
            self.process.kill()
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def kill_at(self, step: int) -> None:
        """Kill it just before its `step`-th step from now on, counted from 1."""
        self._last = len(self.steps) + step

    def end(self) -> None:
        """Kill it now, if it lives, and wait for it."""
        self.process.kill()
        self.process.wait()
        self._watching.join()

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        try:
            while not self.killed and not poll.poll()[0][1] & select.POLLHUP:
                self._one()
        finally:
            os.close(self._listener)

    def _one(self) -> None:
        waiting = bytearray(_CALL.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, waiting)
            ident, _, _, number, _, _, handle, *_ = _CALL.unpack(waiting)
            if step := self._step(number, handle):
                self.steps.append(step)
                if len(self.steps) == self._last:
                    self.process.send_signal(signal.SIGKILL)
                    self.killed = True
                    return
            fcntl.ioctl(self._listener, _ANSWER, bytearray(_REPLY.pack(ident, 0, 0, _CONTINUE)))
        except OSError as e:
            if e.errno != errno.ENOENT:  # it was killed meanwhile
                raise

    def _step(self, number: int, handle: int) -> str:
        """The call in words, "" where it is no step."""
        if number not in _BY_HANDLE:
            return CALLS.get(number, "open")
        if handle == _STDERR:
            return ""
        try:
            what = str(Path(f"/proc/{self.process.pid}/fd/{handle}").readlink())
        except OSError:
            what = "?"
        if what.startswith(("anon_inode:", "pipe:")):
            return ""
        name = "socket" if what.startswith("socket:") else _MADE_UP.sub("…", Path(what).name)
        return f"{CALLS[number]} {name}"
