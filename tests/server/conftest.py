"""What the server's surfaces are tested over: a filled database, and a hub."""

import pytest

from tests.conftest import ManualClock
from tests.server.sample import fill
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store.store import Store


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
async def filled(store: Store, clock: ManualClock) -> dict[str, int]:
    """Ids of the sample's tunnels by name."""
    return await fill(store, clock.now)
