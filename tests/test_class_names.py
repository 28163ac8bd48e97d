"""A class name means one thing in the whole tree, so that a search for it finds that thing."""

import ast
from collections import defaultdict
from pathlib import Path

import vpn_sentinel

SOURCE = Path(vpn_sentinel.__file__).parent


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert len(places) > 300
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
