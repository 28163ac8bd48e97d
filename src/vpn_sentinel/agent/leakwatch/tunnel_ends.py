"""Where the tunnel's own packets go: as it was reported, as their shape shows, and as a trial found out."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from vpn_sentinel.agent.leakwatch.carrier import Carrier
from vpn_sentinel.agent.leakwatch.egress_map import EgressMap
from vpn_sentinel.agent.leakwatch.fingerprints import is_dtls
from vpn_sentinel.agent.leakwatch.others import Others
from vpn_sentinel.agent.net.endpoints import TCP, Endpoint
from vpn_sentinel.agent.net.facts import FactStore
from vpn_sentinel.agent.net.interfaces import Survey, is_up
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.domain.policy import IPAddress

log = logging.getLogger(__name__)

CONTROL_S: Final = 60.0  # after its last packet, in which a control channel may be opened anew
_MAX_LEARNED: Final = 8
_MAX_CONTROL_CHANNELS: Final = 8


class TunnelEnds:
    """`carrier` tries which host carries the tunnel, `others` what carries other VPNs."""

    def __init__(
        self,
        reported: Callable[[], Iterable[Endpoint]],
        memory: FactStore,
        now: Callable[[], float],
        tried: Callable[[], None],
    ) -> None:
        """`reported` are those that are known from elsewhere; `tried` is called after each trial."""
        self._reported = reported
        self.carrier = Carrier(memory=memory, now=now, changed=tried)
        self.others = Others(now, tried)
        self._learned: OrderedDict[Endpoint, None] = OrderedDict()
        self._control: dict[Endpoint, float] = {}  # where a connection goes that nobody saw begin: when it did last

    @property
    def reported(self) -> tuple[Endpoint, ...]:
        return tuple(self._reported())

    @property
    def all(self) -> tuple[Endpoint, ...]:
        """As far as they are known: told from elsewhere first, then learned."""
        return tuple(dict.fromkeys((*self._reported(), *self._learned, *self.carrier.endpoints)))

    @property
    def found(self) -> tuple[Endpoint, ...]:
        """What was found out here, other VPNs' included."""
        return (*self._learned, *self.carrier.endpoints, *self.others.endpoints)

    @property
    def servers(self) -> tuple[IPAddress, ...]:
        """The hosts that carry the tunnel, as far as they are known: also one of which no port is known."""
        server = self.carrier.server
        ends = (*self._reported(), *self._learned)  # what was found is in doubt where another host came
        return tuple(dict.fromkeys((*(e.address for e in ends), *((server,) if server else ()))))

    def look(self, survey: Survey, around: EgressMap, meant: Iterable[IPAddress], *, able: bool) -> None:
        """What is there now; `able` is whether packets can be watched, and so a trial made."""
        hosts, reported = around.candidates(self._reported(), meant)
        ways = tuple(i.name for i in around.interfaces)
        device = survey.device()
        standing = device is not None and is_up(device) and survey.carries
        self.carrier.look(device if standing else None, hosts, ways, able=able, reported=reported)
        self.others.look(*around.beside(self.servers), ways)

    def learn(self, end: Endpoint) -> None:
        """A packet's shape shows that the tunnel's, or another VPN's, go there."""
        self._learned[end] = None
        self._learned.move_to_end(end)
        if len(self._learned) > _MAX_LEARNED:
            self._learned.popitem(last=False)
        log.info("the tunnel's own packets are known by their shape", extra={"endpoint": str(end)})

    def is_dtls_again(self, packet: Packet) -> bool:
        """Whether it tries DTLS at the server to which TLS carries the tunnel meanwhile."""
        found = self.carrier.found
        return found is not None and (found.address, found.protocol) == (packet.destination, TCP) and is_dtls(packet)

    def may_be_control(self, packet: Packet, now: float) -> bool:
        """Whether it may be of a control channel beside the tunnel's data: nobody saw the beginning of the connection.

        Or it begins one where such a one was until now: the program does so when it connects anew.
        """
        port, to = packet.destination_port, packet.destination
        if packet.protocol != TCP or port is None or all(end.address != to for end in self.all):
            return False
        if packet.opens:
            return now - self._control.get(Endpoint(to, port, TCP), float("-inf")) <= CONTROL_S
        self._control[Endpoint(to, port, TCP)] = now
        if len(self._control) > _MAX_CONTROL_CHANNELS:
            del self._control[next(iter(self._control))]
        return True
