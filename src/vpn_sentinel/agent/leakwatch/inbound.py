"""Which flows were begun from outside: what leaves in such a flow is an answer, as its owner wants it.

TCP: a connection that the other side began, seen by its first packet, or one of a port that takes connections here, or
did until lately. One that is passed on, to a container's published port say, has no socket here: where its beginning
was not seen, its ports tell, as `_is_between_service_and_client` says. That lets no new connection out.
UDP: a packet of that very flow came in first. A flow that was begun from here never becomes one. Which was first is
told by the kernel's times of both, since packets may be read long after they passed, and in another order. Of a flow
that may be older than the watch the socket tells: one that is connected to the far end is a client's, unless another
one with its port is there for everybody, as a server has it. What such a one sends in the first seconds may go to
visitors from before; if it begins a flow later, it is a program that does, like a torrent client, and has none.
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
UDP_FLOW_S: Final = 180.0  # after its last packet, as the kernel's own table of connections keeps it
# Seconds that a port counts as taking connections when it takes none any more: FIN is repeated for some 100 s (tcp(7)).
TAKEN_S: Final = 600.0
OLDER_S: Final = 60.0  # after the first look: by then the flows that were there before have shown themselves
OLD_S: Final = 3.0  # after the first look: by then a service that sends by itself has sent to each of its visitors
SERVICES_BELOW: Final = 1024  # privileged ports (ip_unprivileged_port_start, ip-sysctl)
_ANSWERED: Final = float("-inf")  # in the place of when its first packet passed
CLIENTS_FROM: Final = 32768  # ip_local_port_range of a network namespace that nobody set; IANA's range is in it

# protocol, address and port here, address and port there
Flow = tuple[int, IPAddress, int, IPAddress, int]


class ServiceSockets(Protocol):
    """Sockets of this network namespace. Each call may raise OSError."""

    def listens(self, port: int, version: int) -> bool:
        """Whether a socket takes connections on this port."""
        ...

    def listening(self) -> frozenset[int]:
        """The ports on which connections are taken."""
        ...

    def is_ephemeral(self, port: int) -> bool:
        """Whether it is one of the ports that the kernel gives to programs that ask for none."""
        ...

    def serves(self, port: int, version: int) -> bool:
        """Whether a UDP socket takes datagrams of everybody on this port."""
        ...

    def of(self, protocol: int, source: IPAddress, port: int, far: IPAddress, far_port: int) -> Socket | None:
        """The socket of a connection, None when there is none."""
        ...


class Flows:
    """Bounded. Each call says the time, `now`, and when the packet `passed` by the kernel's clock, in seconds."""

    def __init__(self, sockets: ServiceSockets | None) -> None:
        self._sockets = sockets
        self._since = float("inf")  # when the first look was
        self._took: dict[int, float] = {}  # ports that take connections: when they were seen to do so last
        # When it was heard of last, and until an answer left, when its first packet passed.
        self._came: OrderedDict[Flow, tuple[float, float]] = OrderedDict()
        self._begun: OrderedDict[Flow, float] = OrderedDict()
        self._visitors: OrderedDict[tuple[int, IPAddress], float] = OrderedDict()  # to which UDP port here, and who
        self._old: OrderedDict[Flow, float] = OrderedDict()  # maybe with visitors from before: when each was used last

    def look(self, now: float) -> None:
        """Note which ports take connections now."""
        self._since = min(self._since, now)
        if self._sockets is None:
            return
        with suppress(OSError):  # a sandbox that does not tell: each packet asks again
            self._took |= dict.fromkeys(self._sockets.listening(), now)
        self._took = {port: at for port, at in self._took.items() if now - at <= TAKEN_S}

    def came_in(self, packet: Packet, now: float, passed: float) -> None:
        """A packet from outside: it begins a flow, unless one was begun from here."""
        flow = _flow(packet, inbound=True)
        if flow is None or flow in self._begun:
            return
        if (packet.protocol == UDP and flow not in self._old) or packet.opens:
            _keep(self._came, flow, (now, self._came.get(flow, (now, passed))[1]))
        if packet.protocol == UDP:
            _keep(self._visitors, (flow[2], flow[3]), now)

    def begins(self, packet: Packet, now: float) -> None:
        """A packet left that is no answer."""
        flow = _flow(packet)
        if flow is None:
            return
        _keep(self._begun, flow, now)
        self._came.pop(flow, None)
        self._old.pop(flow, None)
        if packet.protocol == UDP and now - self._since > OLD_S:
            for one in [f for f in self._old if f[2] == flow[2]]:
                del self._old[one]

    def may_be_old(self, packet: Packet, now: float) -> bool:
        """Whether this, the first packet of its flow that was seen, may go to a visitor who is older than the watch.

        It is believed until `begins` is called, and as long as something like a visitor is there: see `is_visited`.
        """
        flow = _flow(packet)
        if flow is None or packet.protocol != UDP or now - self._since > OLD_S or not self._may_serve(flow):
            return False
        _keep(self._old, flow, now)
        self._came.pop(flow, None)  # what came in came behind it
        return True

    def is_visited(self, packet: Packet) -> bool:
        """Whether datagrams came in on its port, of several hosts, or from a client's port to the one host there is."""
        hosts = {host for port, host in self._visitors if port == packet.source_port}
        return len(hosts) > 1 or (bool(hosts) and (packet.destination_port or 0) >= CLIENTS_FROM)

    def is_answer(self, packet: Packet, now: float, passed: float) -> bool:
        flow = _flow(packet)
        if flow is None or flow in self._begun:
            return False
        if packet.protocol == TCP:
            # A packet that opens a connection is no answer, whichever port it leaves from.
            if packet.opens:
                return False
            answers = flow in self._came or self._is_taken(flow, now) or self._is_passed_on(flow)
            if answers:
                _keep(self._came, flow, (now, _ANSWERED))  # whatever becomes of the socket
            return answers
        if flow in self._old and now - self._old[flow] <= UDP_FLOW_S:
            _keep(self._old, flow, now)
            return True
        heard, first = self._came.get(flow, (float("-inf"), 0.0))
        answers = now - heard <= UDP_FLOW_S and first <= passed
        if answers and first != _ANSWERED and now - self._since <= OLDER_S and self._is_a_clients(flow):
            return False
        if answers:
            _keep(self._came, flow, (now, _ANSWERED))  # from here on a clock that is set changes nothing
        return answers

    def visited(self, packet: Packet, now: float, *, older: bool) -> bool:
        """Whether UDP of that host came to this port before, however long ago: servers send unasked, too.

        In the first minute nobody knows who was there before: where flows may be `older` than the watch, each was.
        """
        visitor = packet.source_port or 0, packet.destination
        older = older and now - self._since <= OLDER_S
        if packet.protocol == UDP and (visitor in self._visitors or older):
            _keep(self._visitors, visitor, now)
            return True
        return False

    def _is_taken(self, flow: Flow, now: float) -> bool:
        _protocol, near, port, _far, _far_port = flow
        if now - self._took.get(port, float("-inf")) <= TAKEN_S:
            return True
        if self._sockets is None:
            return False
        try:
            return self._sockets.listens(port, near.version)
        except OSError:
            return False

    def _may_serve(self, flow: Flow) -> bool:
        """Whether its socket is there for everybody, on a port that its program chose, and the far end is no service.

        Where both have the same port neither is a client, as between two telephones. What has no socket here is passed
        on, of a container's published port for one.
        """
        _protocol, _near, port, _far, far_port = flow
        if self._sockets is None or far_port < SERVICES_BELOW or far_port == port:
            return False
        try:
            sender = self._sockets.of(*flow)
            if sender is not None and sender.far is not None:
                return False
            return (sender is not None and sender.is_kernels) or not self._sockets.is_ephemeral(port)
        except OSError:
            return False

    def _is_a_clients(self, flow: Flow) -> bool:
        if self._sockets is None:
            return False
        try:
            sender = self._sockets.of(*flow)
            return sender is not None and sender.far == flow[3] and not self._sockets.serves(flow[2], flow[1].version)
        except OSError:
            return False

    def _is_passed_on(self, flow: Flow) -> bool:
        """Whether a connection that has no socket here is one of a service behind this host."""
        if self._sockets is None or not _is_between_service_and_client(flow):
            return False
        try:
            return self._sockets.of(*flow) is None
        except OSError:
            return False


def _is_between_service_and_client(flow: Flow) -> bool:
    """Whether the port here is one that services have, and the far one a client's.

    What a container or another host sends by itself keeps its port in masquerading, a client's (iptables-extensions(8),
    MASQUERADE), or gets one from 1024 on.
    """
    _protocol, _near, port, _far, far_port = flow
    return port < SERVICES_BELOW <= far_port or port < CLIENTS_FROM <= far_port


def _flow(packet: Packet, *, inbound: bool = False) -> Flow | None:
    if packet.source_port is None or packet.destination_port is None or packet.protocol not in (TCP, UDP):
        return None
    far, here = (packet.source, packet.source_port), (packet.destination, packet.destination_port)
    return (packet.protocol, *(here if inbound else far), *(far if inbound else here))


def _keep(flows: "OrderedDict[K, T]", flow: K, what: T) -> None:
    flows[flow] = what
    flows.move_to_end(flow)
    if len(flows) > MAX_FLOWS:
        flows.popitem(last=False)
