"""Importing a package without what it brings along and nobody here needs: that costs memory for good."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def stand_ins(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """Until the end of the block, `import` gives these in place of the modules of their names; None: there is none.

    Only who imports within the block gets them, and keeps them. A module that is loaded already stays what it is.
    """
    absent = {name: stand_in for name, stand_in in modules.items() if name not in sys.modules}
    sys.modules.update(absent)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
