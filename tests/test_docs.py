"""The docs name what the code has: every setting, finding, metric, bot command, CLI command and route."""

import argparse
import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from docs import make_settings, make_states
from tests.server.test_doors import OPEN, READ, REPORT, TABLE
from vpn_sentinel.agent.health import ROUTES as AGENT_ROUTES
from vpn_sentinel.cli.main import COMMANDS
from vpn_sentinel.cli.settings import every_setting
from vpn_sentinel.domain.notice import Kind
from vpn_sentinel.domain.verdict import Code
from vpn_sentinel.runtime.settings import PREFIX, UNPREFIXED, key_of
from vpn_sentinel.server.api import health
from vpn_sentinel.server.api.routes import ROUTES
from vpn_sentinel.server.bot import commands as bot

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
# Answered in front of the API's own routes, or made by the framework.
OTHER_ROUTES = {"POST /keepalive", "GET /agent", "POST /agent", "GET /schema/openapi.json"}
AGENT = "/client/health"
# What prometheus_client puts behind the name that the code says.
ENDINGS = {"Counter": "_total", "CounterMetricFamily": "_total", "InfoMetricFamily": "_info"}
PAGES = sorted([ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]*)#?([^)\s]*)\)")


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def named(text: str) -> set[str]:
    """What stands between backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


def settings_declared() -> set[str]:
    return {key_of(name) for setting in every_setting() for name in setting.names}


def metrics_made() -> set[str]:
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    made = re.findall(r'(\w+)\(\s*"(vpn_sentinel_[a-z0-9_]+)"', source)
    assert {name for _, name in made} == set(re.findall(r'"(vpn_sentinel_[a-z0-9_]+)"', source)), "made in another way"
    return {name + ENDINGS.get(kind, "") for kind, name in made}


def first_cells(text: str) -> list[str]:
    """What stands between backticks at the start of a table's row."""
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def commands_known() -> Iterator[str]:
    parser = argparse.ArgumentParser()
    parsers = parser.add_subparsers()
    for name, (_, module) in COMMANDS.items():
        import_module(f"vpn_sentinel.cli.{module}").add(parsers)
        yield name
        for action in parsers.choices[name]._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from (f"{name} {verb}" for verb in action.choices)


def test_each_test_that_takes_long_is_there() -> None:
    text = (ROOT / "docs" / "tests.md").read_text(encoding="utf-8")
    slow = re.findall(r"`([a-z_/]+\.py)::(test_\w+)`", text)
    assert len(slow) >= 20
    for file, name in slow:
        said = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(async )?def {name}\(", said, re.MULTILINE), f"{file}::{name}"


def test_every_setting_is_documented_and_no_other() -> None:
    rows = {cell for cell in first_cells(page("settings.md")) if cell.startswith(PREFIX) or cell in UNPREFIXED}
    assert rows == settings_declared()


def test_every_finding_is_documented_and_no_other() -> None:
    rows = set(re.findall(r"^\| `([a-z0-9_]+)`", page("findings.md"), re.MULTILINE))
    assert rows == set(Code)


def test_every_metric_is_documented_and_no_other() -> None:
    assert {c for c in first_cells(page("metrics.md")) if c.startswith("vpn_")} == metrics_made()


def test_every_bot_command_is_documented() -> None:
    assert {f"/{c}" for c in bot.COMMANDS} <= named(page("bot.md"))


def test_every_command_is_documented() -> None:
    text = page("cli.md")
    assert [c for c in commands_known() if f"`vpn-sentinel {c}" not in text] == []


def test_every_route_is_documented_and_no_other() -> None:
    own = {f"{m} {re.sub(':[a-z]+', '', p)}" for route in ROUTES for p in route.paths for m in route.http_methods}
    said = {c for c in first_cells(page("api.md")) if " " in c}
    assert said == {route.replace(" ", " /api/v1", 1) for route in own | OTHER_ROUTES}


def test_every_route_of_health_is_documented_and_no_other() -> None:
    said = {c for c in first_cells(page("api.md")) if c.startswith("/")}
    agent = {c for c in said if c.startswith(AGENT)}
    assert said - agent == health._PATHS
    assert agent == {path for path in AGENT_ROUTES if path.startswith(AGENT)}


# --- security ---------------------------------------------------------------------------------------------------------

UNITS = {"": 1, "s": 1, "KB": 1024, "MB": 1024 * 1024}
BOUND = re.compile(
    r"^\| [^|]+ \| ([0-9,]+) ?([A-Zs]*) \| `([a-z_/]+)\.py` `([A-Za-z_.]+)(?:\[([0-9])\])?` \|$", re.MULTILINE
)


def set_in(module: str, name: str, index: str) -> float:
    """A constant, or the default of a field of a dataclass."""
    found = import_module("vpn_sentinel." + module.replace("/", "."))
    owner, _, field = name.rpartition(".")
    if owner:
        return float(inspect.signature(getattr(found, owner)).parameters[field].default)
    value = getattr(found, name)
    return float(value[int(index)] if index else value)


def test_the_bounds_that_stand_are_those_of_the_code() -> None:
    rows = BOUND.findall(page("security.md"))
    assert len(rows) == page("security.md").count(".py` `"), "a row that this test does not read"
    wrong = {}
    for figure, unit, module, name, index in rows:
        stands = set_in(module, name, index)
        if int(figure.replace(",", "")) * UNITS[unit] != stands:
            wrong[module, name] = stands
    assert wrong == {}


def test_who_may_call_is_what_the_table_of_the_doors_holds() -> None:
    said = re.findall(r"^\| `([^`]+)` \| ([A-Z]+) \| ([a-z ]+) \|$", page("security.md"), re.MULTILINE)
    callers = {"anyone": OPEN, "shared key": READ, "any key": REPORT}
    rows = {path: row for paths in TABLE.values() for path, row in paths.items()}
    assert [path for path, _, _ in said] == list(rows)
    assert {path: rows[path][method] for path, method, _ in said} == {path: callers[who] for path, _, who in said}


# --- situations -------------------------------------------------------------------------------------------------------


def situations() -> dict[int, list[str]]:
    """The cells of each row by its number: situation, verdict, lab, program."""
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", page("situations.md"), re.MULTILINE)
    return {int(number): [cell.strip() for cell in cells.split("|")] for number, cells in rows}


def names_of_tests(*folders: str) -> set[str]:
    sources = [p.read_text(encoding="utf-8") for folder in folders for p in (ROOT / "tests" / folder).rglob("*.py")]
    return {name for source in sources for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)}


def rows_of(test: str) -> set[int]:
    found = re.match(r"test_rows?_([\d_]+)_", test)
    return {int(n) for n in found[1].split("_")} if found else set()


def test_situations_are_complete_and_in_order() -> None:
    assert list(situations()) == list(range(1, 85))
    assert {number: len(cells) for number, cells in situations().items() if len(cells) != 4} == {}


def test_findings_of_situations_exist_or_are_marked_as_not_built() -> None:
    marked, plain = set[str](), set[str]()
    for _, verdict, _, _ in situations().values():
        for code, mark in re.findall(r"`([a-z0-9_]+)`( \(not built\))?", verdict):
            (marked if mark else plain).add(code)
    assert plain - set(Code) - set(Kind) - {"lo"} == set()
    assert marked & {*Code, *Kind} == set(), "built by now"


def test_tests_named_in_situations_exist_and_none_is_left_out() -> None:
    lab = {(n, test) for n, cells in situations().items() for test in named(cells[2])}
    program = {(n, test) for n, cells in situations().items() for test in named(cells[3])}
    assert {test for _, test in lab} <= names_of_tests("lab")
    assert {test for _, test in program} <= names_of_tests("")
    assert {(n, test) for test in names_of_tests("lab") for n in rows_of(test)} == lab
    assert {(n, test) for test in names_of_tests("acceptance") for n in rows_of(test)} <= program


def test_each_exemption_of_the_leak_watch_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| ([^|]+) \|$", page("situations.md"), re.MULTILINE)
    tests = [test for cell in rows for test in named(cell) if test.startswith("test_")]
    assert len(tests) >= 11
    assert set(tests) <= names_of_tests("")


def test_situations_judged_in_the_case_table_are_in_it() -> None:
    cases = (ROOT / "tests" / "domain" / "test_verdict.py").read_text(encoding="utf-8")
    judged = {int(n) for n in re.findall(r'^    "(\d+) ', cases, re.MULTILINE)}
    assert {n for n, cells in situations().items() if cells[3] == "case table"} <= judged
    assert {n for n, cells in situations().items() if cells[3] == "not yet"} & judged == set()


def test_the_page_of_settings_is_current() -> None:
    assert make_settings.PAGE.read_text(encoding="utf-8") == make_settings.render(), "run: make pages"


def test_the_page_of_states_is_current() -> None:
    assert make_states.PAGE.read_text(encoding="utf-8") == make_states.render(), "run: make pages"


def anchors_of(where: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", where.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}


@pytest.mark.parametrize("where", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(where: Path) -> None:
    for link, anchor in LINK.findall(where.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target = where.parent / link if link else where
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), f"{link}#{anchor}"


PACKAGE = ROOT / "src" / "vpn_sentinel"
# Where a path that the page of the architecture names may begin.
BEGINNINGS = (ROOT, PACKAGE, *(folder for part in ("agent", "server", "") for folder in (PACKAGE / part).iterdir()))


@cache
def defined(file: Path) -> frozenset[str]:
    """The names that a module defines: a word of a comment or of a message is none."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                found.add(name)
    return frozenset(found)


def in_the_tree(name: str) -> bool:
    """Whether `a/b.py`, `a/b`, `a/b.Name` or `module.Name` is a file, or is defined in one."""
    path, _, attribute = name.removesuffix("/").partition(".")
    if any((begin / name).exists() or (begin / f"{name}.py").exists() for begin in BEGINNINGS):
        return True
    modules = [file for begin in BEGINNINGS for file in (begin / f"{path}.py", begin / path / "__init__.py")]
    return any(set(attribute.split(".")) <= defined(module) for module in modules if module.exists())


def test_paths_in_the_architecture_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    paths = {name for name in named(text) if re.fullmatch(r"[a-z_]+/[a-zA-Z_./]*", name)}
    assert len(paths) > 60
    assert {path for path in paths if not in_the_tree(path)} == set()


def test_names_in_the_architecture_exist() -> None:
    """What is written as in code: `Class`, `Class.method`, `module`, `module.function`, `_private`, `field`."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    files = [p for part in ("src", "bench", "lab") for p in (ROOT / part).rglob("*") if p.name != "__pycache__"]
    modules: dict[str, set[str]] = {}
    for file in files:
        modules.setdefault(file.stem, set()).update(defined(file) if file.suffix == ".py" else ())
    known = set(modules).union(*modules.values())
    written = {name for name in named(text) if re.fullmatch(r"(?![A-Z_]+(\.|$))\w+(\.\w+)*", name)}
    with_ending = {name for name in written if name.endswith((".py", ".toml"))}
    assert len(written) > 150
    assert {name for name in written - with_ending if not set(name.split(".")) <= known} == set()
    pairs = [(name, *name.rsplit(".", 1)) for name in written - with_ending if "." in name]
    in_modules = [(name, owner.split(".")[-1], last) for name, owner, last in pairs if last not in modules]
    assert {name for name, owner, last in in_modules if owner in modules and last not in modules[owner]} == set()
    assert with_ending <= {
        p.name for folder in ("src", "tests", "") for p in (ROOT / folder).glob("**/*" if folder else "*")
    }


@pytest.mark.parametrize("where", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_settings_in_the_docs_exist(where: Path) -> None:
    said = set(re.findall(r"VPN_SENTINEL_[A-Z_]+[A-Z]", where.read_text(encoding="utf-8")))
    known = settings_declared() | {PREFIX + "CONFIG"}
    assert {name for name in said if name not in known and name.removesuffix("_FILE") not in known} == set()
