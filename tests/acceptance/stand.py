"""One tunnel under watch in the lab: a site, an agent inside it, a server of its own on the internet, and a chat.

Every stand has its own server and its own chat, so that stands run side by side and a message can be counted.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lab import Lab, until

KEY = "acceptance-key-0123456789"
# Time between two reports, in seconds: short, so that silence comes soon.
INTERVAL = 4.0


class Stand:
    def __init__(
        self,
        lab: Lab,
        site: str,
        number: int,
        folder: Path,
        *,
        agent: Mapping[str, str] | None = None,
        lan: bool = False,
    ) -> None:
        self.lab, self.site, self.number = lab, lab.site(site), number
        self.name = site
        self.port, self.health, self.dashboard = (base + 10 * number for base in (5000, 8081, 8080))
        self.chat = 1000 + number
        self.folder = folder / site
        self.folder.mkdir(parents=True)
        self.url = f"http://{lab.server4}:{self.port}"
        if lan:
            self.url = f"http://{self.site.server_lan}:{self.port}"
        self.server_log, self.agent_log = f"server-{site}", f"agent-{site}"
        self.agent_settings = {
            "VPN_SENTINEL_URL": self.url,
            "VPN_SENTINEL_ALLOW_INSECURE": "true",  # plain HTTP: the lab's wire is watched by nobody
            "VPN_SENTINEL_API_KEY": KEY,
            "VPN_SENTINEL_CLIENT_ID": site,
            "VPN_SENTINEL_INTERVAL": str(INTERVAL),
            "VPN_SENTINEL_DATA_DIR": str(self.folder / "agent"),
            "VPN_SENTINEL_HOME_NETWORKS": ",".join(self.site.home_networks),
            "VPN_SENTINEL_GEO_DB": str(lab.mmdb),
            **(agent or {}),
        }
        self.server_settings = {
            "VPN_SENTINEL_API_KEY": KEY,
            "VPN_SENTINEL_DATA_DIR": str(self.folder / "server"),
            "VPN_SENTINEL_SERVER_API_PORT": str(self.port),
            "VPN_SENTINEL_SERVER_HEALTH_PORT": str(self.health),
            "VPN_SENTINEL_SERVER_DASHBOARD_PORT": str(self.dashboard),
            "TELEGRAM_BOT_TOKEN": f"{100000 + number}:lab-token-{number}",
            "TELEGRAM_CHAT_ID": str(self.chat),
            # One fault after the other is what these tests do, and so much of it would read as a flapping tunnel.
            "VPN_SENTINEL_FLAP_CALM": "4",
        }
        self.server: Any = None
        self.agent: Any = None

    # --- processes ---

    def start_server(self) -> None:
        command = [sys.executable, "-m", "vpn_sentinel", "server"]
        self.server = self.lab.srv.spawn(command, env=self.server_settings, log=self.server_log)
        self.lab.srv.wait_port(self.port, 20)

    def start_agent(self) -> None:
        command = [sys.executable, "-m", "vpn_sentinel", "agent"]
        self.agent = self.site.spawn(command, env=self.agent_settings, log=self.agent_log)

    def start(self) -> None:
        self.start_server()
        self.start_agent()
        self.wait_state("protected", 20)

    def stop(self) -> None:
        for process in (self.agent, self.server):
            if process is not None:
                process.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- what the server says ---

    def api(self, path: str) -> Any:
        answer = self.lab.http(
            "srv", "GET", f"http://127.0.0.1:{self.port}/api/v1{path}", headers={"X-API-Key": KEY}, timeout=10
        )
        assert answer.status == 200, answer.text
        return answer.json()

    def status(self) -> dict[str, Any]:
        return dict(self.api("/status").get(self.name, {}))

    def codes(self) -> set[str]:
        return {f["code"] for f in self.status().get("findings", [])}

    def wait_state(self, state: str, limit: float) -> dict[str, Any]:
        """Wait until the server says `state`; returns the tunnel's status."""
        found = until(
            lambda: s if (s := self.status()).get("state") == state else None,
            limit,
            lambda: f"{self.name} to be {state}; it is {json.dumps(self.api(f'/tunnels/{self.name}'))}",
            interval=0.1,
        )
        return dict(found or {})

    def history(self) -> list[dict[str, Any]]:
        """Transitions, oldest first: at, old, new, findings."""
        return sorted(self.api(f"/tunnels/{self.name}/history?limit=200")["transitions"], key=lambda t: t["at"])

    def observations(self, since: float, until_: float) -> list[dict[str, Any]]:
        """What the agent saw between two times (seconds since the epoch)."""
        found = self.api(f"/tunnels/{self.name}/history?since={since}&until={until_}&limit=500")["observations"]
        return list(found)

    @staticmethod
    def seconds(when: str) -> float:
        return datetime.fromisoformat(when).timestamp()

    # --- what people were told ---

    def messages(self) -> list[dict[str, Any]]:
        return [m for m in self.lab.telegram.messages() if int(m["chat_id"]) == self.chat]

    def wait_message(self, word: str, after: int, limit: float) -> dict[str, Any]:
        """Wait for a message beyond the first `after` that holds `word`."""

        def found() -> dict[str, Any] | None:
            return next((m for m in self.messages()[after:] if word.lower() in m["plain"].lower()), None)

        def missing() -> str:
            told = [m["plain"][:80] for m in self.messages()[after:]]
            return f"a message to {self.name} with {word!r}; there are {told}"

        message = until(found, limit, missing, interval=0.05)
        return dict(message or {})

    def quiet(self, after: int, seconds: float) -> None:
        """Nothing more is told for `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert len(self.messages()) == after, [m["plain"][:200] for m in self.messages()[after:]]
            time.sleep(0.2)

    def settle(self, limit: float = 60) -> int:
        """Heal, wait until people have been told that all is well, and return how many messages there are by then."""
        self.site.heal()
        self.wait_state("protected", limit)
        home_again = f"{self.name} to be back at its exit"
        until(lambda: self.status()["ip"] == self.site.exit4, limit, home_again, interval=0.1)
        until(lambda: not self.owed(), 20, f"{self.name}: nothing owed", interval=0.1)
        return len(self.messages())

    def owed(self) -> list[dict[str, Any]]:
        return [d for d in self.api("/deliveries?limit=100")["deliveries"] if d["settled_at"] is None]


def once(
    stand: Stand, fault: Callable[[], object], word: str, limit: float, *, hold: float = 6.0
) -> tuple[float, dict[str, Any]]:
    """Apply `fault`; exactly one message follows, with `word`, within `limit` seconds. Returns seconds and message."""
    before = stand.settle()
    began = time.time()
    fault()
    message = stand.wait_message(word, before, limit)
    took = float(message["time"]) - began
    stand.quiet(before + 1, hold)
    return took, message
