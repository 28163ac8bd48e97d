"""What this process knows of tunnels in addition to their rows, and the changes to it that one decision proposes.

A decision reads `Knowledge` through a `Draft` and changes only that draft. `Knowledge.apply` takes the draft over once
the decision is committed; when the commit fails, the draft is dropped and leaves no trace.
"""

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.server.tracking.report_sources import ReportSources
from vpn_sentinel.server.tracking.sites import Sites, SiteView

V = TypeVar("V")


class Repeat(NamedTuple):
    """A keepalive that changed nothing: a hash of it and of the row that it found, and the state of its verdict."""

    mark: int
    state: str


class ForwardedAddress(NamedTuple):
    """A port that a VPN forwards, at an address that the tunnel's own packets came from."""

    address: IPAddress
    port: int


class Overlay(Generic[V]):
    """A mapping with the changes that a decision would make to it; a value of None removes the name."""

    __slots__ = ("_base", "changed")

    def __init__(self, base: Mapping[str, V]) -> None:
        self._base = base
        self.changed: dict[str, V | None] = {}

    def get(self, name: str) -> V | None:
        return self.changed[name] if name in self.changed else self._base.get(name)

    def put(self, name: str, value: V | None) -> None:
        if value is not None or self.get(name) is not None:
            self.changed[name] = value


class Draft:
    """`Knowledge` as one decision sees and leaves it."""

    __slots__ = ("beside_tunnel", "forwarded", "pulse_addresses", "repeats", "sites", "sources")

    def __init__(self, known: "Knowledge") -> None:
        self.sites: SiteView = known.sites.view()
        self.repeats = Overlay(known.repeats)
        self.pulse_addresses = Overlay(known.pulse_addresses)
        self.beside_tunnel = Overlay(known.beside_tunnel)
        self.sources = Overlay(known.sources)
        self.forwarded = Overlay(known.forwarded)


class Knowledge:
    """Each mapping is by a tunnel's name; a name of which nothing is known is missing."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        # The last keepalive, where it changed nothing.
        self.repeats: dict[str, Repeat] = {}
        # The address, for each IP version, that its pulses came from.
        self.pulse_addresses: dict[str, Mapping[int, IPAddress]] = {}
        # True where the agent reports outside its tunnel on purpose: its packets from home prove no leak.
        self.beside_tunnel: dict[str, bool] = {}
        self.sources: dict[str, ReportSources] = {}
        self.forwarded: dict[str, ForwardedAddress] = {}

    def apply(self, draft: Draft) -> None:
        """Take over the changes of a committed decision."""
        self.sites.apply(draft.sites.changed)
        _update(self.repeats, draft.repeats)
        _update(self.pulse_addresses, draft.pulse_addresses)
        _update(self.beside_tunnel, draft.beside_tunnel)
        _update(self.sources, draft.sources)
        _update(self.forwarded, draft.forwarded)

    def move(self, by: float) -> None:
        """The clock was set forward by so many seconds."""
        self.sites.move(by)
        self.sources = {name: sources.moved(by) for name, sources in self.sources.items()}


def _update(base: dict[str, V], overlay: Overlay[V]) -> None:
    for name, value in overlay.changed.items():
        if value is None:
            base.pop(name, None)
        else:
            base[name] = value
