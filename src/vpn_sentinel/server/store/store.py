"""The interface to the database, the same for SQLite and PostgreSQL."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from sqlalchemy import Executable, Row

from vpn_sentinel.runtime.user_error import UserError

T = TypeVar("T")
C = TypeVar("C", bound="Changes")

# Writes another value each time: SQLite writes nothing for an unchanged one, so a full disk would go unnoticed.
PING: Final = (
    "INSERT INTO meta (key, value) VALUES ('ping', '0') "
    "ON CONFLICT (key) DO UPDATE SET value = CAST(CAST(meta.value AS BIGINT) + 1 AS TEXT)"
)

# One statement with `?` for each value, and the rows to run it with.
Batch = tuple[str, Sequence[tuple[object, ...]]]


# What is wrong with the database, by reason; without names of hosts and files.
_PUBLIC_TEXTS: Final = {
    "disk_full": "takes nothing: its disk is full",
    "read_only": "takes nothing: it is read-only",
    "busy": "is held by another program",
    "damaged": "is damaged: see vpn-sentinel db check",
    "timeout": "did not answer in time",
    "unreachable": "cannot be reached: see that it runs, and what the server's log says",
    "closing": "is closed: this server is stopping",
    "locked": "does not let this tunnel be changed: another program holds its row",
}


class StoreUnavailable(UserError):
    """The database cannot be reached or written now. `reason` is a short word for metrics; trying again may help."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason

    @property
    def public_text(self) -> str:
        """What the database does, in words that anybody may read."""
        return _PUBLIC_TEXTS.get(self.reason, "refuses what it is asked: see the server's log")


class TunnelLocked(StoreUnavailable):
    """Nothing of one tunnel can be written now, since another session of the database holds its row."""

    def __init__(self) -> None:
        super().__init__("locked", "another session of the database holds the tunnel's row")


class StoreUnusable(UserError):
    """The database cannot be used at all: a wrong address, a damaged file, a newer schema. One line."""


class StoreDamaged(StoreUnusable):
    """The file is not a database any more, or not a complete one."""


@dataclass(slots=True)
class TunnelRow:
    """A row of `tunnels`, in the order of its columns. JSON columns are text."""

    id: int
    name: str
    created_at: float
    state: str
    since: float
    findings: str
    memory: str
    seen_at: float
    source: str
    version: str
    interval: float
    last_seen: float
    deadline: float | None
    spool: str
    seq: int
    exit4: str | None
    exit6: str | None
    place: str
    resolvers: str
    dns_loc: str
    dns_colo: str
    role: str
    site: str
    policy: str
    port: int | None
    port_check: str


@dataclass(slots=True)
class Changes:
    """What a decision writes: batches, in this order. The store sets `locked`: tunnels that it could not decide on."""

    batches: list[Batch] = field(default_factory=list)
    locked: frozenset[str] = field(default=frozenset(), kw_only=True)


# A pure function from the tunnels' rows by name, which are the transaction's own copies, to the changes to write. It
# runs inside the transaction, and may run twice.
Decide = Callable[[Mapping[str, TunnelRow]], C]


class Store(Protocol):
    """Statements are SQLAlchemy Core's, over the tables of `schema`. Every method raises StoreUnavailable."""

    async def read(self, statement: Executable) -> Sequence[Row[Any]]:
        """Rows of one SELECT, from a committed state."""
        ...

    async def write(self, *statements: Executable) -> list[Sequence[Row[Any]]]:
        """Run statements in one transaction; returns a list of rows for each statement, empty where it has none."""
        ...

    async def transact(self, names: Sequence[str], now: float, decide: Decide[C], *, create: bool) -> C:
        """Read the tunnels called `names`, decide, and write, in one transaction that no other can interleave with.

        With `create`, a name without a row becomes a pending tunnel first. A tunnel whose row another session holds is
        waited for, and then left out: the decision goes without it, and its `locked` names it. Returns the decision
        once the commit is durable.
        """
        ...

    async def ping(self) -> None:
        """Return when a write to the database was committed."""
        ...

    async def close(self) -> None: ...
