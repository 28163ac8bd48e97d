"""Holds the lab's namespaces, and takes the lab down when its owner lets go of a pipe.

A script of its own, not a module of the package: it starts in 20 ms with nothing but the standard library. The owner
writes one line of JSON, reads one line of JSON (node -> PID), and keeps standard input open for as long as the lab
shall live. End of file means "down", whether the owner closed the pipe or was killed: there is only one way down.

Each node is a child with its own network namespace and its own mount namespace (private /run, because
wireguard-go's control socket is a path; own /etc/resolv.conf and /sys).
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_BIND, _MS_REC, _MS_SLAVE = 4096, 16384, 1 << 19
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _mount(source: str, target: str, kind: str, flags: int = 0) -> None:
    _checked(_libc.mount(source.encode(), target.encode(), kind.encode(), flags, None), f"mount {target}")


def _sysctl(key: str, value: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # a kernel without that knob has nothing to set
        Path("/proc/sys", *key.split("/")).write_text(value)


def _bind_file(own: Path, target: str) -> None:
    # /etc/resolv.conf is often a link into /run, which is an empty tmpfs by now.
    real = Path(os.path.realpath(target))
    real.parent.mkdir(parents=True, exist_ok=True)
    if not real.exists():
        real.touch()
    _mount(str(own), str(real), "", _MS_BIND)


def _become_node(own: Path, *, forwards: bool) -> None:
    _checked(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET), "unshare")
    # Slave, not private: when another lab removes its namespaces' names, our copies of those mounts must go as well,
    # or they would keep the other lab's namespaces alive.
    _mount("", "/", "", _MS_REC | _MS_SLAVE)
    while _libc.umount2(b"/run/netns", _MNT_DETACH) == 0:
        pass
    _mount("tmpfs", "/run", "tmpfs")
    for directory in ("/run/wireguard", "/run/openvpn", "/run/lock"):
        Path(directory).mkdir()
    with contextlib.suppress(OSError):  # only for the sake of /sys/class/net
        _mount("sysfs", "/sys", "sysfs")
    _bind_file(own / "resolv.conf", "/etc/resolv.conf")
    _bind_file(own / "hosts", "/etc/hosts")
    for family in ("ipv4", "ipv6"):
        for scope in ("all", "default"):
            _sysctl(f"net/{family}/conf/{scope}/forwarding", "1" if forwards else "0")
    for scope in ("all", "default"):
        _sysctl(f"net/ipv4/conf/{scope}/rp_filter", "0")
        _sysctl(f"net/ipv4/conf/{scope}/src_valid_mark", "1")
        _sysctl(f"net/ipv6/conf/{scope}/disable_ipv6", "0")
        _sysctl(f"net/ipv6/conf/{scope}/accept_dad", "0")
        _sysctl(f"net/ipv6/conf/{scope}/accept_ra", "0")
        # The kernel's own link-local addresses may take a second to appear, and until then a router's packets vanish
        # silently. Each link gets one by hand instead.
        _sysctl(f"net/ipv6/conf/{scope}/addr_gen_mode", "1")
    _sysctl("net/ipv4/icmp_ratelimit", "0")
    _sysctl("net/ipv6/icmp/ratelimit", "0")
    _sysctl("net/ipv4/ping_group_range", "0 2147483647")


def _start_node(own: Path, *, forwards: bool) -> int:
    own.mkdir(parents=True)
    (own / "resolv.conf").write_text("")
    (own / "hosts").write_text("127.0.0.1 localhost\n::1 localhost ip6-localhost\n")
    ready_in, ready_out = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ready_in)
            os.close(0)  # the owner's pipe is the holder's business
            _become_node(own, forwards=forwards)
            os.write(ready_out, b"1")
            os.close(ready_out)
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(ready_out)
    ready = os.read(ready_in, 1)
    os.close(ready_in)
    if ready != b"1":
        raise RuntimeError(f"node {own.name} did not start")
    return pid


def _ip_batch(*lines: str) -> None:
    subprocess.run(["ip", "-force", "-batch", "-"], input="\n".join(lines), text=True, check=False, capture_output=True)


def _inhabitants(namespaces: set[str]) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if str((entry / "ns/net").readlink()) in namespaces:
                    found.append(int(entry.name))
    return found


def _take_down(names: list[str], namespaces: set[str], directory: Path | None) -> None:
    """End every process that lives in one of the lab's namespaces; nobody else can be in there."""
    deadline = time.monotonic() + 5
    while (pids := _inhabitants(namespaces)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.005)
    _ip_batch(*(f"netns del {name}" for name in names))
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    directory = Path(order["directory"])
    names: list[str] = []
    namespaces: set[str] = set()
    pids: dict[str, int] = {}
    try:
        for node, forwards in order["nodes"].items():
            pids[node] = _start_node(directory / "nodes" / node, forwards=forwards)
            namespaces.add(str(Path(f"/proc/{pids[node]}/ns/net").readlink()))
            names.append(f"{order['prefix']}-{node}")
        _ip_batch(*(f"netns attach {order['prefix']}-{node} {pid}" for node, pid in pids.items()))
        print(json.dumps(pids), flush=True)
        sys.stdin.read()
    finally:
        _take_down(names, namespaces, directory if order["remove"] else None)


if __name__ == "__main__":
    main()
