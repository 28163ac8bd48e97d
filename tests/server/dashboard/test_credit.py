"""DB-IP's licence asks for a link where its places are shown."""

import json

import httpx
import pytest
from sqlalchemy import update

from vpn_sentinel.server.store import schema
from vpn_sentinel.server.store.store import Store

LINK = 'href="https://db-ip.com"'


@pytest.mark.parametrize("path", ["/", "/tunnels/seedbox-nl"])
async def test_places_of_dbip_are_credited(
    browser: httpx.AsyncClient, store: Store, filled: dict[str, int], path: str
) -> None:
    assert LINK not in (await browser.get(path)).text
    place = json.dumps({"country": "NL", "city": "Amsterdam", "source": "dbip:2027-01-01"})
    await store.write(update(schema.tunnels).where(schema.tunnels.c.name == "seedbox-nl").values(place=place))
    assert LINK in (await browser.get(path)).text
