"""What every ring of tests shares: both engines as one `store` fixture, and a clock that a test sets."""

import asyncio
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.store import Store

NEEDS_OPENSSL = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is not installed: `make test` as root installs it"
)
POSTGRES_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


class ManualClock:
    """A clock that stands until a test moves it. `set_by` is by how much its wall was set forward."""

    def __init__(self, wall: float = 1_800_000_000.0) -> None:
        self.now = wall
        self.set_by = 0.0

    def wall(self) -> float:
        return self.now + self.set_by

    def boottime(self) -> float:
        return self.now


@contextmanager
def small_disk(folder: Path | str, size: str, run: Callable[..., object] = subprocess.run) -> Iterator[None]:
    """A file system of `size` bytes (2m is 2 MiB) over `folder`, while the body runs. Needs root.

    `run` is subprocess.run, or what runs a command where `folder` is to be seen so, as a site of the lab does.
    """
    run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield
    finally:
        run(["umount", "--lazy", str(folder)], check=True)  # lazily: what a failing test left open hides no failure


@contextmanager
def no_descriptor_left() -> Iterator[int]:
    """All of this process's are taken. Yields how many it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(int(one.name) for one in Path("/proc/self/fd").iterdir()) + 8
    taken = list[int]()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield limit
    finally:
        for one in taken:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def may_open(files: int) -> bool:
    """Whether this process may open so many files, by the hard limit: the soft one is raised for all tests."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard == resource.RLIM_INFINITY or hard >= files


def needs_files(files: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not may_open(files), reason=f"needs {files} open files (ulimit -Hn)")


# What a child inherits as ignored: SIGINT and SIGQUIT of what a shell starts with `&`, SIGHUP under nohup.
_LEFT_TO_CHILDREN = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM)
_FILES = 4096  # that one process may open: some tests come with hundreds of connections at once
# The program's own settings, how wide and colourful a terminal is, and what takes requests to 127.0.0.1 elsewhere.
_LEADS_ELSEWHERE = re.compile(r"(VPN_SENTINEL|TELEGRAM)_.*|TZ|COLUMNS|LINES|(NO|FORCE)_COLOR|(?i:(https?|all)_proxy)")


@pytest.fixture(autouse=True, scope="session")
def _as_a_terminal_starts_it() -> Iterator[None]:
    """Tests, and programs that they start, find signals, limits and settings as a login has them, in any parent.

    What was ignored stays without effect here: a handler that does nothing is, unlike SIG_IGN, not inherited.
    """
    for number in _LEFT_TO_CHILDREN:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # every child would seem to end with 0
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES if may_open(_FILES) else hard, hard))
    before = os.umask(0o022)
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(_LEADS_ELSEWHERE.fullmatch, [*os.environ]):
            patch.delenv(name)
        time.tzset()
        yield
    os.umask(before)


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """A command that a test runs in this process opens its own log: the next test has the one from before."""
    names = ("", "httpx", "httpcore", "uvicorn.access", "uvicorn.error", "websockets", "asyncio", "alembic")
    before = {name: logging.getLogger(name).level for name in names}
    handlers = logging.getLogger().handlers[:]
    yield
    for handler in logging.getLogger().handlers:
        if handler not in handlers:
            handler.close()
    logging.getLogger().handlers[:] = handlers
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def open_folder(prefix: str) -> Path:
    """A new folder that PostgreSQL's user may enter, with a path that a socket can have in any parent.

    Not below TMPDIR, and so not pytest's own: they may be closed to that user, have spaces, or be too long for
    sockaddr_un, which takes 107 bytes.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    folder.chmod(0o755)
    return folder


@pytest.fixture
def open_path() -> Iterator[Path]:
    """As tmp_path, for whoever may not enter that."""
    folder = open_folder("vs-test-")
    yield folder
    shutil.rmtree(folder)


class Postgres:
    """A cluster of the tests' own, on a socket in its own folder; it ends with the test run."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self._folder, self._binaries = folder, binaries
        # PostgreSQL refuses to run as root.
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        self._made = 0

    def start(self) -> None:
        if self._as:
            shutil.chown(self._folder, "postgres")
        data = str(self._folder / "data")
        self._run("initdb", "-D", data, "-U", "sentinel", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8")
        options = f"-k {self._folder} -c listen_addresses= -c fsync=off -c max_connections=200"
        self._run("pg_ctl", "-D", data, "-w", "-t", "60", "-o", options, "-l", str(self._folder / "log"), "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-m", "immediate", "-w", "stop")

    def new_database(self, *options: str) -> str:
        """Create an empty database, with `options` of createdb(1); returns its address."""
        self._made += 1
        name = f"test{self._made}"
        self._run("createdb", "-h", str(self._folder), "-U", "sentinel", *options, name)
        return f"postgresql://sentinel@/{name}?host={self._folder}"

    def drop(self, url: str) -> None:
        """Remove a database, whoever is connected to it."""
        name = url.partition("@/")[2].partition("?")[0]
        self._run("dropdb", "-h", str(self._folder), "-U", "sentinel", "--force", name)

    def _run(self, program: str, *words: str) -> None:
        command = [*self._as, str(self._binaries / program), *words]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stdout}{done.stderr}")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if not POSTGRES_BINARIES:
        pytest.skip("PostgreSQL is not installed: `make test` as root installs it")
    folder = open_folder("vs-pg-")
    cluster = Postgres(folder, POSTGRES_BINARIES[0])
    try:
        cluster.start()
        yield cluster
        cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database, once on each engine."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/sentinel.db"
    cluster: Postgres = request.getfixturevalue("postgres")
    return cluster.new_database()


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """An open store with the newest schema, once on each engine."""
    opened = await open_store(database_url)
    yield opened
    await opened.close()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def until(condition: Callable[[], object], limit: float = 5.0) -> None:
    """Wait for `condition()` to hold. Raises TimeoutError after `limit` seconds."""
    async with asyncio.timeout(limit):
        while not condition():  # noqa: ASYNC110 - the condition is whatever a test looks at
            await asyncio.sleep(0.01)


@pytest.hookimpl(trylast=True)  # pytest-rerunfailures shows them by their own name first
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last line of a run names what was tried again, and not only how much: `2 passed, 1 rerun (test_x) in 3s`."""
    if again := terminalreporter.stats.pop("rerun", []):
        names = dict.fromkeys(report.nodeid.partition("@")[0] for report in again)  # without xdist's group
        terminalreporter.stats[f"rerun ({', '.join(names)})"] = again
        terminalreporter._set_main_color()  # which also lists what the line is made of; done already where a run is cut


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a lab stay with one worker: one lab for each file and each kind of tunnel, or as a file says."""
    for item in items:
        if item.get_closest_marker("acceptance") is not None and item.get_closest_marker("xdist_group") is None:
            kind = re.search(r"\[.*(wireguard|openvpn)", item.name)
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{kind[1] if kind else ''}"))
