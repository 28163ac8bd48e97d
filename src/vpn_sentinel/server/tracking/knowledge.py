"""What this process knows of tunnels besides their rows, and the changes to it that one decision proposes.

A decision reads `Knowledge` through a `Draft` and changes nothing but that draft. `Knowledge.apply` takes the draft
over once the decision is committed; where the commit fails, the draft is dropped, and nothing that never was stays
behind.
"""

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.server.tracking.report_sources import ReportSources
from vpn_sentinel.server.tracking.sites import Sites, SiteView

V = TypeVar("V")


class Repeat(NamedTuple):
    """A keepalive that moved nothing: `mark` tells it and the memory it met from others, `state` was its verdict's."""

    mark: int
    state: str


class ForwardedAddress(NamedTuple):
    """A port that a VPN forwards, at an address that the tunnel's own packets came from."""

    address: IPAddress
    port: int


class Overlay(Generic[V]):
    """A mapping, and what a decision would change in it; a value of None removes the name."""

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
    """By a tunnel's name; a name that nothing is known of is missing."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        # What its last keepalive was, where that moved nothing.
        self.repeats: dict[str, Repeat] = {}
        # The address of either version that its pulses came from.
        self.pulse_addresses: dict[str, Mapping[int, IPAddress]] = {}
        # True for those whose agents report beside them on purpose: what of theirs comes from home proves nothing.
        self.beside_tunnel: dict[str, bool] = {}
        self.sources: dict[str, ReportSources] = {}
        self.forwarded: dict[str, ForwardedAddress] = {}

    def apply(self, draft: Draft) -> None:
        """Take over what a decision changed, once it is committed."""
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
