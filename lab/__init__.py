"""An internet in a box: network namespaces, real WireGuard and OpenVPN, stand-ins for the outside world.

from lab import Lab, Site

with Lab([Site("anna", provider="nl"), Site("ben", vpn="openvpn", provider="ch", kill_switch=False)]) as lab:
    anna = lab.site("anna")
    print(anna.run(["curl", "-s", "https://ipinfo.io/json"]).stdout)
    anna.delete_tunnel()
"""

from lab import plan
from lab.capture import Capture, Packet
from lab.home import Home, Site
from lab.nodes import Node, Process, Response, until
from lab.world import Lab

__all__ = ["Capture", "Home", "Lab", "Node", "Packet", "Process", "Response", "Site", "plan", "until"]
