"""The dashboard over a filled database."""

from collections.abc import AsyncIterator

import httpx
import pytest
from litestar import Litestar

from tests.conftest import ManualClock
from tests.server.sample import settings
from vpn_sentinel.server.dashboard.app import DashboardServices, build_dashboard
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store.store import Store


@pytest.fixture
def services(store: Store, clock: ManualClock, hub: Hub) -> DashboardServices:
    return DashboardServices(
        store=store, hub=hub, settings=settings(PUBLIC_URL="https://vpn.example.net:8443"), clock=clock
    )


@pytest.fixture
def dashboard(services: DashboardServices) -> Litestar:
    return build_dashboard(services)


@pytest.fixture
async def browser(dashboard: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(dashboard, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
        yield client
