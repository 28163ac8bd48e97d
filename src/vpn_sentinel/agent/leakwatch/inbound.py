"""Find the flows that were begun from outside: what leaves in such a flow is an answer, and no leak.

TCP: the first packet of a connection came in, or its local port listens or did so lately. A forwarded connection, e.g.
to a container's published port, has no socket here: where its first packet was not seen, its ports decide
(`_is_between_service_and_client`). No new connection gets out by that.

UDP: a packet of that flow came in first; a flow that was begun from here never becomes an answer. The kernel's
timestamps decide which was first, since packets may be read much later and in another order. For a flow that may be
older than the watch, the socket decides: one that is connected to the far end is a client's, unless another socket on
its port takes datagrams from everybody, as a server's does. What a server sends in the first seconds may go to clients
from before the watch; if it begins a flow later, it is a program that does so, like a torrent client, and those flows
do not count as answers.
"""

from collections import OrderedDict
from contextlib import suppress
from typing import Final, Protocol, TypeVar

from vpn_sentinel.agent.net.endpoints import TCP, UDP
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.agent.net.sockets import Socket
from vpn_sentinel.domain.policy import IPAddress

K = TypeVar("K")
T = TypeVar("T")

MAX_FLOWS: Final = 2048
UDP_FLOW_S: Final = 180.0  # a flow lives so long after its last packet, as in the kernel's connection tracking
# How long a port counts as listening after its socket is closed: FIN is repeated for about 100 s (tcp(7)).
LISTENED_S: Final = 600.0
OLDER_FLOWS_S: Final = 60.0  # after the start: by then every older flow has sent a packet
FIRST_SENDS_S: Final = 3.0  # after the start: by then a service has sent to each of its clients
SERVICE_PORTS_BELOW: Final = 1024  # privileged ports (ip_unprivileged_port_start, ip-sysctl)
_ANSWERED_BEFORE: Final = float("-inf")  # instead of the time of its first packet
CLIENT_PORTS_FROM: Final = 32768  # the default ip_local_port_range; it contains IANA's range

# protocol, address and port here, address and port there
Flow = tuple[int, IPAddress, int, IPAddress, int]


class ServiceSockets(Protocol):
    """Sockets of this network namespace. Each call may raise OSError."""

    def listens(self, port: int, version: int) -> bool:
        """Whether a TCP socket listens on this port."""
        ...

    def listening(self) -> frozenset[int]:
        """The TCP ports that listen."""
        ...

    def is_ephemeral(self, port: int) -> bool:
        """Whether the kernel gives this port to programs that ask for none (ip_local_port_range)."""
        ...

    def serves(self, port: int, version: int) -> bool:
        """Whether an unconnected UDP socket is bound to this port."""
        ...

    def of(self, protocol: int, source: IPAddress, port: int, far: IPAddress, far_port: int) -> Socket | None:
        """The socket of a connection, None when there is none."""
        ...


class Flows:
    """Bounded. Callers pass the time, `now`, and when the packet `passed` by the kernel's clock, in seconds."""

    def __init__(self, sockets: ServiceSockets | None) -> None:
        self._sockets = sockets
        self._first_update = float("inf")  # when `update` was first called
        self._listened_at: dict[int, float] = {}  # when a port was last seen to listen
        # When its last packet was seen, and when its first packet passed or _ANSWERED_BEFORE.
        self._inbound: OrderedDict[Flow, tuple[float, float]] = OrderedDict()
        self._begun: OrderedDict[Flow, float] = OrderedDict()
        self._visitors: OrderedDict[tuple[int, IPAddress], float] = OrderedDict()  # by local UDP port and host
        # Maybe with clients from before the watch: when each was last used.
        self._maybe_old: OrderedDict[Flow, float] = OrderedDict()

    def update(self, now: float) -> None:
        """Note which ports listen now."""
        self._first_update = min(self._first_update, now)
        if self._sockets is None:
            return
        with suppress(OSError):  # a sandbox that hides sockets: each packet asks again
            self._listened_at |= dict.fromkeys(self._sockets.listening(), now)
        self._listened_at = {port: at for port, at in self._listened_at.items() if now - at <= LISTENED_S}

    def came_in(self, packet: Packet, now: float, passed: float) -> None:
        """Note a packet from outside: it begins a flow, unless the flow was begun from here."""
        flow = _flow(packet, inbound=True)
        if flow is None or flow in self._begun:
            return
        if (packet.protocol == UDP and flow not in self._maybe_old) or packet.opens:
            _keep(self._inbound, flow, (now, self._inbound.get(flow, (now, passed))[1]))
        if packet.protocol == UDP:
            _keep(self._visitors, (flow[2], flow[3]), now)

    def begins(self, packet: Packet, now: float) -> None:
        """Note a packet that left and is no answer."""
        flow = _flow(packet)
        if flow is None:
            return
        _keep(self._begun, flow, now)
        self._inbound.pop(flow, None)
        self._maybe_old.pop(flow, None)
        if packet.protocol == UDP and now - self._first_update > FIRST_SENDS_S:
            for one in [f for f in self._maybe_old if f[2] == flow[2]]:
                del self._maybe_old[one]

    def may_be_old(self, packet: Packet, now: float) -> bool:
        """Whether this first seen packet of a flow may go to a client from before the watch.

        That holds until `begins` is called, and only while `has_visitors` is true.
        """
        flow = _flow(packet)
        is_late = now - self._first_update > FIRST_SENDS_S
        if flow is None or packet.protocol != UDP or is_late or not self._may_be_a_service(flow):
            return False
        _keep(self._maybe_old, flow, now)
        self._inbound.pop(flow, None)  # what came in came after it
        return True

    def has_visitors(self, packet: Packet) -> bool:
        """Whether several hosts sent datagrams to its local port, or one host did and the packet goes to a client's
        port.
        """
        hosts = {host for port, host in self._visitors if port == packet.source_port}
        return len(hosts) > 1 or (bool(hosts) and (packet.destination_port or 0) >= CLIENT_PORTS_FROM)

    def is_answer(self, packet: Packet, now: float, passed: float) -> bool:
        flow = _flow(packet)
        if flow is None or flow in self._begun:
            return False
        if packet.protocol == TCP:
            # A packet that opens a connection is no answer, whichever port it leaves from.
            if packet.opens:
                return False
            answers = flow in self._inbound or self._is_listened(flow, now) or self._is_passed_on(flow)
            if answers:
                _keep(self._inbound, flow, (now, _ANSWERED_BEFORE))  # also after the socket is gone
            return answers
        if flow in self._maybe_old and now - self._maybe_old[flow] <= UDP_FLOW_S:
            _keep(self._maybe_old, flow, now)
            return True
        last, first = self._inbound.get(flow, (float("-inf"), 0.0))
        answers = now - last <= UDP_FLOW_S and first <= passed
        may_be_older = first != _ANSWERED_BEFORE and now - self._first_update <= OLDER_FLOWS_S
        if answers and may_be_older and self._is_client(flow):
            return False
        if answers:
            _keep(self._inbound, flow, (now, _ANSWERED_BEFORE))  # from now on a change of the clock has no effect
        return answers

    def knows_visitor(self, packet: Packet, now: float, *, older: bool) -> bool:
        """Whether UDP of that host came to this port before, however long ago: servers send unasked, too.

        In the first minute older clients are not known: where flows may be `older` than the watch, each counts as one.
        """
        visitor = packet.source_port or 0, packet.destination
        older = older and now - self._first_update <= OLDER_FLOWS_S
        if packet.protocol == UDP and (visitor in self._visitors or older):
            _keep(self._visitors, visitor, now)
            return True
        return False

    def _is_listened(self, flow: Flow, now: float) -> bool:
        _protocol, near, port, _far, _far_port = flow
        if now - self._listened_at.get(port, float("-inf")) <= LISTENED_S:
            return True
        if self._sockets is None:
            return False
        try:
            return self._sockets.listens(port, near.version)
        except OSError:
            return False

    def _may_be_a_service(self, flow: Flow) -> bool:
        """Whether its socket is unconnected, on a port that its program chose, and the far end is no service.

        Where both ports are the same, neither end is a client (two telephones). A flow without a socket here is
        forwarded, e.g. that of a container's published port.
        """
        _protocol, _near, port, _far, far_port = flow
        if self._sockets is None or far_port < SERVICE_PORTS_BELOW or far_port == port:
            return False
        try:
            sender = self._sockets.of(*flow)
            if sender is not None and sender.far is not None:
                return False
            return (sender is not None and sender.is_kernels) or not self._sockets.is_ephemeral(port)
        except OSError:
            return False

    def _is_client(self, flow: Flow) -> bool:
        if self._sockets is None:
            return False
        try:
            sender = self._sockets.of(*flow)
            return sender is not None and sender.far == flow[3] and not self._sockets.serves(flow[2], flow[1].version)
        except OSError:
            return False

    def _is_passed_on(self, flow: Flow) -> bool:
        """Whether a connection without a socket here belongs to a service behind this host."""
        if self._sockets is None or not _is_between_service_and_client(flow):
            return False
        try:
            return self._sockets.of(*flow) is None
        except OSError:
            return False


def _is_between_service_and_client(flow: Flow) -> bool:
    """Whether the local port is a service's, and the far one a client's.

    What a container or another host begins keeps its client port under masquerading (iptables-extensions(8),
    MASQUERADE), or gets one from 1024 on.
    """
    _protocol, _near, port, _far, far_port = flow
    return port < SERVICE_PORTS_BELOW <= far_port or port < CLIENT_PORTS_FROM <= far_port


def _flow(packet: Packet, *, inbound: bool = False) -> Flow | None:
    if packet.source_port is None or packet.destination_port is None or packet.protocol not in (TCP, UDP):
        return None
    far, here = (packet.source, packet.source_port), (packet.destination, packet.destination_port)
    return (packet.protocol, *(here if inbound else far), *(far if inbound else here))


def _keep(flows: "OrderedDict[K, T]", flow: K, value: T) -> None:
    flows[flow] = value
    flows.move_to_end(flow)
    if len(flows) > MAX_FLOWS:
        flows.popitem(last=False)
