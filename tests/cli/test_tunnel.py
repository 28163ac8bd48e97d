"""`vpn-sentinel tunnel`: what the API answers, on a terminal."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from tests.conftest import ManualClock
from tests.server.sample import KEY, fill, settings
from vpn_sentinel.cli.main import main
from vpn_sentinel.server.access import Access
from vpn_sentinel.server.api.app import build_api
from vpn_sentinel.server.api.services import ApiServices
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store.open import open_store


@pytest.fixture
def answers(tmp_path: Path, clock: ManualClock) -> dict[str, object]:
    """What the API says of the tunnels in a database, by path; the database is `tmp_path / "s.db"`."""

    async def ask() -> dict[str, object]:
        store, config = await open_store(f"sqlite:///{tmp_path}/s.db"), settings()
        try:
            names = await fill(store, clock.now)
            access = Access(store, clock, config.api_key)
            api = build_api(ApiServices(store=store, access=access, hub=Hub(), settings=config, clock=clock))
            transport = httpx.ASGITransport(api)  # type: ignore[arg-type]
            headers = {"X-API-Key": KEY}
            async with httpx.AsyncClient(transport=transport, base_url="http://s/api/v1", headers=headers) as client:
                paths = ["/tunnels", *(f"/tunnels/{name}" for name in names)]
                return {path: (await client.get(path)).json() for path in paths}
        finally:
            await store.close()

    return asyncio.run(ask())


def test_json_is_what_the_api_answers(
    answers: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = ["--database-url", f"sqlite:///{tmp_path}/s.db", "--json"]
    assert main(["tunnel", "list", *database]) == 0
    assert json.loads(capsys.readouterr().out) == answers.pop("/tunnels")
    assert answers
    for path, said in answers.items():
        assert main(["tunnel", "show", path.removeprefix("/tunnels/"), *database]) == 0
        assert json.loads(capsys.readouterr().out) == said


def test_one_tunnel_on_a_terminal(
    answers: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answers
    database = ["--database-url", f"sqlite:///{tmp_path}/s.db"]
    assert main(["tunnel", "list", *database]) == 0
    listed = capsys.readouterr().out
    assert listed.splitlines()[0].split() == ["NAME", "STATE", "SINCE", "EXIT", "COUNTRY", "LAST", "SEEN"]
    assert "seedbox-nl" in listed
    assert main(["tunnel", "show", "seedbox-nl", *database]) == 0
    assert capsys.readouterr().out.startswith("seedbox-nl is ")
    assert main(["tunnel", "show", "nobody", *database]) == 1
    assert "there is no tunnel called nobody" in capsys.readouterr().err
