"""Nodes: running things inside one namespace of the lab."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], timeout: float, what: str | Callable[[], str], interval: float = 0.01) -> T:
    """Wait for a condition to become true and return its value; TimeoutError names `what` was awaited."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout:g} s still waiting for: {what() if callable(what) else what}")
        time.sleep(interval)
    return value


class Process(subprocess.Popen[bytes]):
    """A program in a node. Its output goes to the file `log`. The lab ends it at the latest when the lab goes down."""

    log: Path

    def output(self) -> str:
        """What it has written so far, standard output and error together."""
        return self.log.read_text(errors="replace")

    def stop(self, timeout: float = 5) -> int:
        """SIGTERM, then SIGKILL when it does not listen. Returns the exit status."""
        if self.poll() is None:
            self.terminate()
            try:
                return self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.wait()

    def pause(self) -> None:
        """SIGSTOP: alive, but not answering."""
        self.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class Response:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        return json.loads(self.body)


def import_path() -> dict[str, str]:
    """The environment in which a child finds the modules that this process finds."""
    repository = str(Path(__file__).resolve().parents[1])
    return {"PYTHONPATH": os.pathsep.join([repository, *filter(None, sys.path)])}


@dataclass
class Node:
    """One machine of the lab: a network namespace and a mount namespace."""

    name: str
    pid: int
    directory: Path
    ca_file: Path
    address4: str = ""
    """Public addresses, for nodes at the core (isp, svc, srv, providers)."""
    address6: str = ""
    _nft: dict[str, str] = field(default_factory=dict)
    _processes: list[Process] = field(default_factory=list)

    def argv(self, command: Sequence[str | Path], cwd: str | Path | None = None) -> list[str]:
        """The command line that runs `command` in this node. It does not fork: the PID is the program's."""
        where = cwd or Path.cwd()
        enter = ["nsenter", f"--net=/proc/{self.pid}/ns/net", f"--mount=/proc/{self.pid}/ns/mnt", f"--wdns={where}"]
        return [*enter, "--", *map(str, command)]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """A clean environment: nothing of this machine's proxies and certificates, but the lab's CA."""
        path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin:/bin"
        clean = {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", "TERM": os.environ.get("TERM", "dumb")}
        return clean | {"SSL_CERT_FILE": str(self.ca_file)} | dict(extra or {})

    def run(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 30,
        check: bool = False,
        stdin: str | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in this node and wait for it."""
        done = subprocess.run(
            self.argv(command, cwd),
            env=self.environment(env),
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise RuntimeError(
                f"{self.name}: {' '.join(map(str, command))} -> {done.returncode}\n{done.stderr}{done.stdout}"
            )
        return done

    def spawn(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        log: str | None = None,
        cwd: str | Path | None = None,
    ) -> Process:
        """Start a program in this node. `log` names its log file (`<lab.dir>/logs/<node>-<log>.log`, appended to)."""
        name = log or Path(str(command[0])).name
        path = self.directory / "logs" / f"{self.name}-{name}.log"
        with path.open("ab") as sink:
            process = Process(
                self.argv(command, cwd),
                env=self.environment(env),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.log = path
        self._processes.append(process)
        return process

    def ip(self, *lines: str, force: bool = False) -> None:
        """Run lines of `ip` commands in one batch; those that begin with "-6" in a second one, after the others.

        With `force`, lines that fail are passed over."""
        plain = [line for line in lines if not line.startswith("-6 ")]
        six = [line.removeprefix("-6 ") for line in lines if line.startswith("-6 ")]
        for options, batch in ([], plain), (["-6"], six):
            if batch:
                command = ["ip", *options, *(["-force"] if force else []), "-batch", "-"]
                self.run(command, stdin="\n".join(batch) + "\n", check=not force)

    def nft(self, table: str, body: str) -> bool:
        """Replace one nftables table in one transaction. Returns False when it already read like this."""
        if self._nft.get(table) == body:
            return False
        family_table = f"inet {table}"
        text = f"add table {family_table}\ndelete table {family_table}\ntable {family_table} {{\n{body}\n}}\n"
        self.run(["nft", "-f", "-"], stdin=text, check=True)
        self._nft[table] = body
        return True

    def has_link(self, name: str) -> bool:
        return any(line.split(":")[0].strip() == name for line in self.links())

    def links(self) -> list[str]:
        """Lines of /proc/net/dev: read from outside, because that costs no process."""
        return Path(f"/proc/{self.pid}/net/dev").read_text().splitlines()[2:]

    def root(self, path: str) -> Path:
        """A path inside this node's mount namespace, as seen from outside."""
        return Path(f"/proc/{self.pid}/root{path}")

    def resolv_conf(self, servers: Iterable[str]) -> None:
        """Rewrite /etc/resolv.conf in place: it is a bind mount, and a rename would not be seen."""
        text = "".join(f"nameserver {server}\n" for server in servers) + "options timeout:2 attempts:2\n"
        with (self.directory / "nodes" / self.name / "resolv.conf").open("r+b") as file:
            file.write(text.encode())
            file.truncate()

    def listens(self, port: int, protocol: str = "tcp") -> bool:
        """Whether something listens on a port of this node."""
        wanted_state = "0A" if protocol == "tcp" else "07"
        for table in (protocol, f"{protocol}6"):
            for line in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == wanted_state and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    return True
        return False

    def wait_port(self, port: int, timeout: float = 10, protocol: str = "tcp") -> None:
        """Wait until something listens on a port of this node."""
        until(lambda: self.listens(port, protocol), timeout, f"{self.name} listening on {protocol} port {port}")

    def http(
        self,
        method: str,
        url: str,
        *,
        json_body: object = None,
        data: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10,
    ) -> Response:
        """An HTTP request from this node, by curl. ConnectionError when there was no answer."""
        command = ["curl", "-sS", "-i", "--http1.1", "--max-time", str(timeout), "-X", method, url]
        for key, value in (headers or {}).items():
            command += ["-H", f"{key}: {value}"]
        if json_body is not None:
            data = json.dumps(json_body)
            command += ["-H", "Content-Type: application/json"]
        if data is not None:
            command += ["--data-binary", "@-", "-H", "Expect:"]
        done = subprocess.run(
            self.argv(command),
            env=self.environment(),
            input=(data or "").encode(),
            capture_output=True,
            timeout=timeout + 5,
            check=False,
        )
        if done.returncode != 0:
            raise ConnectionError(f"{self.name}: {method} {url}: {done.stderr.decode(errors='replace').strip()}")
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.split(":", 1) for line in lines)
        return Response(int(status.split()[1]), {k.strip().lower(): v.strip() for k, v in pairs}, body)

    def reap(self) -> None:
        """Collect the exit status of everything started here, after the lab went down."""
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
