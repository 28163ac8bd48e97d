"""The parts of the server that the API uses."""

from dataclasses import dataclass

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.access import Access
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiServices:
    store: Store
    access: Access
    hub: Hub
    settings: ServerSettings
    clock: Clock
