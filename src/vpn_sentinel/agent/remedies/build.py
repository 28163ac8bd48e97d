"""Make the remedies from their settings. Imported only where one is switched on."""

import logging

from vpn_sentinel.agent.introspect.gluetun import CONTROL
from vpn_sentinel.agent.introspect.settings import IntrospectSettings
from vpn_sentinel.agent.net.facts import FactStore
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.remedies import gluetun, hook
from vpn_sentinel.agent.remedies.plan import RemedyRules
from vpn_sentinel.agent.remedies.qbittorrent import QBittorrent
from vpn_sentinel.agent.remedies.remedies import OnAction, Remedies
from vpn_sentinel.agent.remedies.settings import ReactionSettings
from vpn_sentinel.agent.remedies.torrents import TorrentClient
from vpn_sentinel.agent.remedies.transmission import Transmission
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import environment

log = logging.getLogger(__name__)


def build_remedies(
    settings: ReactionSettings,
    policy: Policy,
    facts: FactStore,
    http: Client,
    clock: Clock,
    on_action: OnAction,
    *,
    client_id: str,
    control: IntrospectSettings,
) -> Remedies:
    """The remedies that are switched on. `on_action` gets each remedy that ran; `control` has gluetun's address."""
    clients: list[TorrentClient] = []
    if settings.qbittorrent_url:
        user, password = settings.qbittorrent_user, settings.qbittorrent_password
        clients.append(QBittorrent(http, settings.qbittorrent_url, user, password))
    if settings.transmission_url:
        user, password = settings.transmission_user, settings.transmission_password
        clients.append(Transmission(http, settings.transmission_url, user, password))
    after = settings.after
    settled = {State.DOWN: policy.grace_down, State.DEGRADED: policy.grace_degraded}
    settled[State.PROTECTED] = policy.grace_recovery

    async def run_hook(document: bytes) -> str:
        output = await hook.run_hook(
            settings.hook, document, hook.without_own_settings(environment()), settings.hook_timeout
        )
        if output:
            log.info("output of the command", extra={"output": output})
        return "ended well"

    async def restart() -> str:
        return await gluetun.restart(http, control.gluetun or CONTROL, control.login.headers())

    return Remedies(
        RemedyRules(
            hook=bool(settings.hook),
            restart=settings.gluetun_restart,
            clients=tuple(c.name for c in clients),
            resume=settings.resume,
            restart_after=30.0 if after is None else after,
            pause_after=0.0 if after is None else after,
            settled=settled if after is None else dict.fromkeys(settled, after) | {State.LEAKING: after},
            cap=settings.cap,
        ),
        facts,
        clock,
        on_action,
        client_id=client_id,
        hook=run_hook if settings.hook else None,
        restart=restart,
        clients=tuple(clients),
        dry_run=settings.dry_run,
    )
