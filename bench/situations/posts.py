"""A post: one site of the lab under watch, with a server and a chat of its own, and an ear on the server's events."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import Lab, Site, until
from tests.acceptance.stand import KEY, Stand

NOBODY = 65534
# Starts a program without root and without a single capability, as a container with `user: 65534` and `cap_drop: ALL`.
UNPRIVILEGED = (
    "setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
    "--bounding-set=-all",
    "--inh-caps=-all",
    "--no-new-privs",
)
CANARY_ZONE = "canary.sentinel.test"
CHAT = 2000
# Repeats within minutes are flapping indeed; its minute of calm after each would be all that a run waits for.
REPEATED = {"VPN_SENTINEL_FLAP_CALM": "4"}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a post is: its site, its settings. `interval` is seconds; 30 is what users have.

    Posts of one `chain` never run at the same time, because they share something of the lab: port 53 of the server,
    or services that are told to fail. `ready` brings about what is healthy here and the lab does not do by itself.
    """

    site: Mapping[str, Any]
    agent: Mapping[str, str] = field(default_factory=dict)
    server: Mapping[str, str] = field(default_factory=dict)
    interval: float = 30.0
    chain: str = ""
    zone: bool = False
    ready: Callable[["Post"], None] | None = None
    watched: bool = True
    """An agent runs here; without one, only what a row itself starts."""
    user: int | None = None
    """The agent runs as this user, with CAP_NET_RAW where agents are privileged at all."""

    def of(self, name: str, kind: str) -> Site:
        """The site; one that says itself which VPN it has is the same whatever `kind` is."""
        return Site(name, **{"vpn": kind, **self.site})


@dataclass(frozen=True)
class Frame:
    """What the server said of the tunnel at `time`, in seconds since the epoch."""

    time: float
    state: str
    codes: frozenset[str]
    exit4: str | None
    body: Mapping[str, Any]


class Ear:
    """The server's event stream, read in a thread."""

    def __init__(self, lab: Lab, port: int, tunnel: str) -> None:
        self._frames: list[Frame] = []
        self._news = threading.Condition()
        self._tunnel = tunnel
        command = ["curl", "-sN", "-H", f"X-API-Key: {KEY}", f"http://127.0.0.1:{port}/api/v1/events"]
        self._curl = subprocess.Popen(lab.srv.argv(command), env=lab.srv.environment(), stdout=subprocess.PIPE)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._curl.stdout is not None
        for line in self._curl.stdout:
            if not line.startswith(b"data: "):
                continue
            now = time.time()
            for tunnel in json.loads(line[6:])["tunnels"]:
                if tunnel["name"] == self._tunnel:
                    with self._news:
                        self._frames.append(frame(now, tunnel))
                        self._news.notify_all()

    def since(self, began: float) -> list[Frame]:
        with self._news:
            return [f for f in self._frames if f.time >= began]

    def wait(self, began: float, wanted: Callable[[Frame], bool], limit: float) -> Frame | None:
        """The first frame from `began` on that is `wanted`, or None when `limit` seconds passed without one."""
        deadline = time.monotonic() + limit
        with self._news:
            while True:
                found = next((f for f in self._frames if f.time >= began and wanted(f)), None)
                left = deadline - time.monotonic()
                if found is not None or left <= 0:
                    return found
                self._news.wait(left)

    def close(self) -> None:
        self._curl.kill()
        self._curl.wait()
        self._thread.join(5)
        assert self._curl.stdout is not None
        self._curl.stdout.close()


def frame(at: float, tunnel: Mapping[str, Any]) -> Frame:
    codes = frozenset(f["code"] for f in tunnel["findings"])
    return Frame(at, tunnel["state"], codes, tunnel["exit"]["ipv4"], tunnel)


class Post(Stand):
    """A stand whose server has two addresses, on the internet and, where there is one, on the LAN."""

    ear: Ear

    def __init__(self, lab: Lab, name: str, number: int, folder: Path, profile: Profile, *, privileged: bool,
                 source: Path | None = None) -> None:  # fmt: skip
        super().__init__(lab, name, number, folder)
        self.profile, self.privileged = profile, privileged
        self.chat = CHAT + number
        urls = [self.url, *([f"http://{self.site.server_lan}:{self.port}"] if self.site.server_lan else [])]
        self.agent_settings |= {"VPN_SENTINEL_URL": ",".join(urls), "VPN_SENTINEL_INTERVAL": f"{profile.interval:g}"}
        if self.site.reference is not None:
            self.agent_settings |= {"VPN_SENTINEL_SITE": name}
        self.agent_settings |= {k: v.replace("{port}", str(self.port)) for k, v in profile.agent.items()}
        self.server_settings |= {"TELEGRAM_CHAT_ID": str(self.chat), **REPEATED, **profile.server}
        if profile.zone:
            self.server_settings |= {"VPN_SENTINEL_CANARY_ZONE": CANARY_ZONE}
        if source is not None:
            self.agent_settings["PYTHONPATH"] = self.server_settings["PYTHONPATH"] = str(source)
        self.reference: Any = None
        self.gluetun: Any = None
        self.fountain: Any = None
        self.port_told = 50000
        self.launcher: tuple[str, ...] = ("-m", "vpn_sentinel")

    # --- processes ---

    def start_server(self) -> None:
        super().start_server()
        self.ear = Ear(self.lab, self.port, self.name)

    def stop_server(self, *, kill: bool = False) -> None:
        self.ear.close()
        if kill:
            self.server.kill()
            self.server.wait(5)
        else:
            self.server.stop()

    def start_agent(self) -> None:
        data = Path(self.agent_settings["VPN_SENTINEL_DATA_DIR"])
        data.mkdir(exist_ok=True)
        prefix: tuple[str, ...] = ()
        if not self.privileged:
            prefix = UNPRIVILEGED
            for path in (data, *data.iterdir()):
                os.chown(path, NOBODY, NOBODY)
        elif self.profile.user is not None:
            who = self.profile.user
            prefix = ("setpriv", f"--reuid={who}", f"--regid={who}", "--clear-groups", "--inh-caps=+net_raw",
                      "--ambient-caps=+net_raw")  # fmt: skip
            for path in (data, *data.iterdir()):
                os.chown(path, who, who)
        command = [*prefix, sys.executable, *self.launcher, "agent"]
        self.agent = self.site.spawn(command, env=self.agent_settings, log=self.agent_log)

    def start_reference(self) -> None:
        """The reference agent on the home's LAN, outside the tunnel, of the same site and server."""
        assert self.site.reference is not None
        folder = self.folder / "reference"
        folder.mkdir(exist_ok=True)
        settings = {
            **self.agent_settings,
            "VPN_SENTINEL_CLIENT_ID": f"{self.name}-ref",
            "VPN_SENTINEL_DATA_DIR": str(folder),
            "VPN_SENTINEL_HEALTH_PORT": "8083",
        }
        command = [sys.executable, "-m", "vpn_sentinel", "agent", "--role", "reference"]
        self.reference = self.site.reference.spawn(command, env=settings, log="reference")

    def start(self) -> None:
        """Server, agent, and whatever is healthy here; back when people have been told that the tunnel is well."""
        self.start_server()
        if self.profile.ready is not None:
            self.profile.ready(self)
        if not self.profile.watched:
            return
        self.start_agent()
        self.wait_state("protected", 40)
        self.wait_message("protected", 0, 20)
        self.at_rest(30)

    def stop(self) -> None:
        if self.reference is not None:
            self.reference.stop()
        for process in (self.gluetun, self.fountain):
            if process is not None:
                process.stop()
        if getattr(self, "ear", None) is not None:
            self.ear.close()
        super().stop()

    # --- what the server says, and what people hear ---

    def now(self) -> Frame:
        return frame(time.time(), self.api(f"/tunnels/{self.name}"))

    def moves(self, since: float) -> list[dict[str, Any]]:
        """Transitions decided from `since` on, oldest first."""
        return [m for m in self.history() if self.seconds(m["decided_at"]) >= since]

    def messages(self) -> list[dict[str, Any]]:
        return self.lab.telegram.messages(chat_id=self.chat)

    def heard(self, since: float) -> list[dict[str, Any]]:
        """Messages about this tunnel that arrived from `since` on.

        Left out are the reference agent's own, and that the home has a new address, which is news of the home.
        """
        others = (f"{self.name}-ref", "has a new address")
        return [m for m in self.messages() if m["time"] >= since and not any(o in m["plain"] for o in others)]

    # --- between two trials ---

    def heal(self) -> None:
        self.site.heal()
        if self.profile.ready is not None:
            self.profile.ready(self)

    def at_rest(self, limit: float) -> None:
        """Wait until the server says protected, at the right exit, and nobody is owed a message."""

        def well() -> bool:
            seen = self.now()
            return seen.state == "protected" and seen.exit4 == self.site.exit4 and not self.owed()

        until(well, limit, f"{self.name} to be at rest; it is {self.brief()}", interval=0.25)

    def brief(self) -> str:
        """Where the tunnel stands, in a few words."""
        with contextlib.suppress(AssertionError, ConnectionError):
            seen = self.now()
            return f"{seen.state} ({', '.join(sorted(seen.codes))}) at {seen.exit4}"
        return "not to be asked"
