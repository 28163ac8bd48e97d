"""Packets that wait for a trial: the tunnel's program, or another VPN's, may have moved to where they go."""

from typing import Final

from vpn_sentinel.agent.leakwatch.carrier import FRESH_S, SURE_S
from vpn_sentinel.agent.leakwatch.tunnel_ends import TunnelEnds
from vpn_sentinel.agent.net.packets import Packet

MAX_HELD_PACKETS: Final = 16


class AwaitingTrial:
    """Holds at most `MAX_HELD_PACKETS`, each with the name of its interface, until `take`; true while it holds any."""

    def __init__(self, ends: TunnelEnds) -> None:
        self._carrier, self._others = ends.carrier, ends.others
        self._may_be_control = ends.may_be_control
        self._held: list[tuple[Packet, str]] = []

    def hold(self, packet: Packet, interface: str, now: float, *, reported: bool) -> bool:
        """Hold a packet, ask for a trial, and return True, where a trial must decide about it first: the tunnel's
        program, or another VPN's, may have moved to this endpoint.

        `reported`: its flow was reported before, and for more of its packets an older trial is good enough.
        """
        if self._others.doubts(packet.destination) and len(self._held) < MAX_HELD_PACKETS:
            self._held.append((packet, interface))
            self._others.doubt()
            return True
        if not self._carrier.doubts(packet.destination):
            return False
        if not reported and self._may_be_control(packet, now):
            return True
        if self._carrier.sure(SURE_S if reported else FRESH_S):
            return False
        if len(self._held) < MAX_HELD_PACKETS:
            self._held.append((packet, interface))
        self._carrier.doubt()
        return True

    def take(self) -> list[tuple[Packet, str]]:
        """The packets that waited, to be judged now; none waits any longer."""
        held, self._held = self._held, []
        return held

    async def settle(self) -> None:
        """Wait until the trials that packets wait for have ended."""
        if self._held:
            await self._others.settle()
            await self._carrier.settle()

    def __bool__(self) -> bool:
        return bool(self._held)
