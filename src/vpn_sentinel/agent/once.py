"""One round on this machine, judged here: what `check` does, without spool, server or memory."""

from dataclasses import dataclass, replace

from vpn_sentinel.agent import round as rounds
from vpn_sentinel.agent.equipment import chosen_services, flock, http_client, open_databases, open_kernel, path_to
from vpn_sentinel.agent.interfaces import Paths, Survey, survey
from vpn_sentinel.agent.names import Names
from vpn_sentinel.agent.probes.canary import Flock
from vpn_sentinel.agent.probes.place import Places
from vpn_sentinel.agent.probes.trace import whoami
from vpn_sentinel.agent.settings import ProbeSettings
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import Verdict, judge, learned_home
from vpn_sentinel.runtime.clock import Clock


@dataclass(frozen=True, slots=True)
class Looked:
    seen: Observation
    verdict: Verdict
    survey: Survey


async def look_once(settings: ProbeSettings, policy: Policy, clock: Clock, *, server: str | None = None) -> Looked:
    """Look and judge. `server` is the address of a VPN Sentinel server that is asked as well. Raises SettingError."""
    http = http_client(settings, Names())
    databases = open_databases(settings)
    kernel = open_kernel()
    found = survey(kernel, configured=settings.tunnel_interface)

    def whom(paths: Paths) -> Flock:
        usual = flock(settings, http, (), paths)
        if server is None:
            return usual
        path = path_to(server, paths)
        return replace(usual, also=(lambda: whoami(http, server, path),))

    eyes = rounds.Eyes(
        kernel=kernel,
        survey=lambda: found,
        flock=whom,
        places=Places(http, chosen_services(settings), clock, databases=databases, limit=min(settings.timeout, 4.0)),
        clock=clock,
    )
    try:
        seen = await rounds.look(eyes, Trigger.START, policy)
    finally:
        if kernel is not None:
            kernel.close()
    return Looked(seen, judge(seen, learned_home(seen, policy)), found)
