"""Named facts that outlive a round, and with the spool also the process: which device is the tunnel, and the like."""

from typing import Protocol


class FactStore(Protocol):
    """`agent.spool.spool.Spool` is one."""

    def fact(self, name: str) -> str | None: ...

    def keep(self, name: str, value: str) -> None: ...


class InMemoryFacts:
    """A `FactStore` that does not outlive the process."""

    def __init__(self) -> None:
        self._facts: dict[str, str] = {}

    def fact(self, name: str) -> str | None:
        return self._facts.get(name)

    def keep(self, name: str, value: str) -> None:
        self._facts[name] = value
