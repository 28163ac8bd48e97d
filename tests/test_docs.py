"""The docs name what the code has: every setting, finding, metric, bot command, CLI command and route."""

import argparse
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from docs import make_states
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.cli.main import COMMANDS
from vpn_sentinel.domain.verdict import Code
from vpn_sentinel.runtime.settings import PREFIX, UNPREFIXED, Source
from vpn_sentinel.server.api.routes import ROUTES
from vpn_sentinel.server.bot import commands as bot
from vpn_sentinel.server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
# Answered in front of the API's own routes, or made by the framework.
OTHER_ROUTES = {"/keepalive", "/agent", "/schema/openapi.json"}
HEALTH = {"/health", "/health/ready", "/health/startup", "/metrics"}
PAGES = sorted([ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def named(text: str) -> set[str]:
    """What stands between backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


def settings_asked() -> set[str]:
    server, agent = Source(env={}), Source(env={PREFIX + "URL": "https://sentinel.example"})
    ServerSettings.read(server)
    AgentSettings.read(agent)
    return {name if name in UNPREFIXED else PREFIX + name for name in server.asked | agent.asked}


def metrics_made() -> set[str]:
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    return set(re.findall(r'"(vpn_sentinel_[a-z0-9_]+)"', source))


def commands_known() -> Iterator[str]:
    parser = argparse.ArgumentParser()
    parsers = parser.add_subparsers()
    for name, (_, module) in COMMANDS.items():
        import_module(f"vpn_sentinel.cli.{module}").add(parsers)
        yield name
        for action in parsers.choices[name]._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from (f"{name} {verb}" for verb in action.choices)


def test_every_setting_is_documented_and_no_other() -> None:
    documented = {w for w in named(page("settings.md")) if w.startswith(PREFIX) or w in UNPREFIXED}
    assert documented - {PREFIX + "CONFIG"} == settings_asked()


def test_every_finding_is_documented_and_no_other() -> None:
    rows = set(re.findall(r"^\| `([a-z0-9_]+)`", page("findings.md"), re.MULTILINE))
    assert rows == set(Code)


def test_every_metric_is_documented() -> None:
    text = page("metrics.md")
    assert {m for m in metrics_made() if m not in text} == set()


def test_every_bot_command_is_documented() -> None:
    assert {f"/{c}" for c in bot.COMMANDS} <= named(page("bot.md"))


def test_every_command_is_documented() -> None:
    text = page("cli.md")
    assert [c for c in commands_known() if f"`vpn-sentinel {c}" not in text] == []


def test_every_route_is_documented() -> None:
    paths = {re.sub(r":\w+", "", path) for route in ROUTES for path in route.paths} | OTHER_ROUTES | HEALTH
    text = page("api.md")
    assert {p for p in paths if f"{p}`" not in text} == set()


def test_the_page_of_states_is_current() -> None:
    assert make_states.PAGE.read_text(encoding="utf-8") == make_states.render(), "run: python docs/make_states.py"


@pytest.mark.parametrize("where", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(where: Path) -> None:
    links = [link for link in LINK.findall(where.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (where.parent / link).exists()] == []


@pytest.mark.parametrize("where", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_settings_in_the_docs_exist(where: Path) -> None:
    said = set(re.findall(r"VPN_SENTINEL_[A-Z_]+[A-Z]", where.read_text(encoding="utf-8")))
    known = settings_asked() | {PREFIX + "CONFIG"}
    assert {name for name in said if name not in known and name.removesuffix("_FILE") not in known} == set()
