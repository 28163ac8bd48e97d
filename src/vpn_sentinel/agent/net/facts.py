"""Facts by name that outlive a round, and in the spool the process: who is the tunnel, what carries it."""

from typing import Protocol


class FactStore(Protocol):
    """`agent.spool.spool.Spool` is one."""

    def fact(self, name: str) -> str | None: ...

    def keep(self, name: str, value: str) -> None: ...


class Recollection:
    """A `FactStore` that ends with the process."""

    def __init__(self) -> None:
        self._facts: dict[str, str] = {}

    def fact(self, name: str) -> str | None:
        return self._facts.get(name)

    def keep(self, name: str, value: str) -> None:
        self._facts[name] = value
