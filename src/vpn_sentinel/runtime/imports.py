"""Import a package without modules that it imports and this project does not use: they would cost memory for good."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def stand_ins(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """Within the block, `import` returns these instead of the modules of their names; None makes the import fail.

    Only modules that import within the block get them, and keep them. A module that is loaded already is not replaced.
    """
    absent = {name: stand_in for name, stand_in in modules.items() if name not in sys.modules}
    sys.modules.update(absent)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
