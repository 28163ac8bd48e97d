"""The roles of an agent: it watches a tunnel, or stands for the home connection beside the tunnels of its site."""

from typing import Final

from vpn_sentinel.runtime.settings import Idle

TUNNEL: Final = "tunnel"
REFERENCE: Final = "reference"

# For settings of what a reference agent does not do.
NOT_FOR_REFERENCE: Final = Idle(beside="ROLE", spoils=lambda role: role.lower() == REFERENCE)
