"""The API over a filled database."""

from collections.abc import AsyncIterator

import httpx
import pytest
from litestar import Litestar

from tests.conftest import ManualClock
from tests.server.sample import KEY, settings
from vpn_sentinel.server.access import Access, create_token
from vpn_sentinel.server.api.app import build_api
from vpn_sentinel.server.api.services import ApiServices
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store.store import Store


@pytest.fixture
def services(store: Store, clock: ManualClock, hub: Hub) -> ApiServices:
    config = settings()
    return ApiServices(store=store, access=Access(store, clock, config.api_key), hub=hub, settings=config, clock=clock)


@pytest.fixture
def api(services: ApiServices) -> Litestar:
    return build_api(services)


@pytest.fixture
async def nobody(api: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    """A caller without a key."""
    transport = httpx.ASGITransport(api, client=("192.0.2.1", 1234), raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://sentinel.test/api/v1") as client:
        yield client


@pytest.fixture
async def reader(nobody: httpx.AsyncClient) -> httpx.AsyncClient:
    """A caller with the shared key."""
    nobody.headers["X-API-Key"] = KEY
    return nobody


@pytest.fixture
async def tunnel_token(store: Store, clock: ManualClock) -> str:
    return await create_token(store, "seedbox-nl", shared=False, now=clock.now)


@pytest.fixture
async def shared_token(store: Store, clock: ManualClock) -> str:
    return await create_token(store, "reader", shared=True, now=clock.now)
