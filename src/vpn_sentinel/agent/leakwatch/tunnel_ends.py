"""Where the tunnel's own packets go: as reported, as fingerprints show, and as trials show."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from vpn_sentinel.agent.leakwatch.carrier import Carrier
from vpn_sentinel.agent.leakwatch.egress_map import EgressMap
from vpn_sentinel.agent.leakwatch.fingerprints import is_dtls
from vpn_sentinel.agent.leakwatch.other_vpns import OtherVpns
from vpn_sentinel.agent.net.endpoints import TCP, Endpoint
from vpn_sentinel.agent.net.facts import FactStore
from vpn_sentinel.agent.net.interfaces import Survey, is_up
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.domain.policy import IPAddress

log = logging.getLogger(__name__)

CONTROL_REOPEN_S: Final = 60.0  # a control channel may be opened again so long after its last packet
_MAX_LEARNED: Final = 8
_MAX_CONTROL_CHANNELS: Final = 8


class TunnelEnds:
    """`carrier` finds by trial which host carries the tunnel, `others` which hosts carry other VPNs."""

    def __init__(
        self,
        reported: Callable[[], Iterable[Endpoint]],
        memory: FactStore,
        now: Callable[[], float],
        tried: Callable[[], None],
    ) -> None:
        """`reported` returns the endpoints that settings or VPN programs give; `tried` is called after each trial."""
        self._reported = reported
        self.carrier = Carrier(memory=memory, now=now, changed=tried)
        self.others = OtherVpns(now, tried)
        self._learned: OrderedDict[Endpoint, None] = OrderedDict()
        self._control: dict[Endpoint, float] = {}  # ends of connections older than the watch: time of their last packet

    @property
    def reported(self) -> tuple[Endpoint, ...]:
        return tuple(self._reported())

    @property
    def all(self) -> tuple[Endpoint, ...]:
        """All known ones: reported, then learned, then found."""
        return tuple(dict.fromkeys((*self._reported(), *self._learned, *self.carrier.endpoints)))

    @property
    def found(self) -> tuple[Endpoint, ...]:
        """Those that fingerprints and trials showed, other VPNs' included."""
        return (*self._learned, *self.carrier.endpoints, *self.others.endpoints)

    @property
    def servers(self) -> tuple[IPAddress, ...]:
        """The known hosts that carry the tunnel, including one of which no port is known."""
        server = self.carrier.server
        ends = (*self._reported(), *self._learned)  # the carrier's endpoint is in doubt where hosts changed
        return tuple(dict.fromkeys((*(e.address for e in ends), *((server,) if server else ()))))

    def update(self, survey: Survey, around: EgressMap, meant: Iterable[IPAddress], *, able: bool) -> None:
        """Take the present state; `able`: packets can be watched, and so trials made."""
        hosts, reported = around.candidates(self._reported(), meant)
        outside_devices = tuple(i.name for i in around.interfaces)
        device = survey.device()
        works = device is not None and is_up(device) and survey.carries
        self.carrier.update(device if works else None, hosts, outside_devices, able=able, reported=reported)
        self.others.update(*around.beside(self.servers), outside_devices)

    def learn(self, end: Endpoint) -> None:
        """Learn an endpoint to which the tunnel's packets, or another VPN's, go by their fingerprint."""
        self._learned[end] = None
        self._learned.move_to_end(end)
        if len(self._learned) > _MAX_LEARNED:
            self._learned.popitem(last=False)
        log.info("the tunnel's own packets were recognized by their content", extra={"endpoint": str(end)})

    def is_dtls_again(self, packet: Packet) -> bool:
        """Whether it is a try of DTLS at the server to which TLS carries the tunnel for now."""
        found = self.carrier.found
        return found is not None and (found.address, found.protocol) == (packet.destination, TCP) and is_dtls(packet)

    def may_be_control(self, packet: Packet, now: float) -> bool:
        """Whether it may belong to a control channel next to the tunnel's data: a connection whose first packet was not
        seen.

        Or it opens a connection where such a channel was until now, as the program does when it reconnects.
        """
        port, to = packet.destination_port, packet.destination
        if packet.protocol != TCP or port is None or all(end.address != to for end in self.all):
            return False
        if packet.opens:
            return now - self._control.get(Endpoint(to, port, TCP), float("-inf")) <= CONTROL_REOPEN_S
        self._control[Endpoint(to, port, TCP)] = now
        if len(self._control) > _MAX_CONTROL_CHANNELS:
            del self._control[next(iter(self._control))]
        return True
