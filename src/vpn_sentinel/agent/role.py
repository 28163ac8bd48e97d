"""The roles of an agent: it watches a tunnel, or the home connection outside the tunnels of its site."""

from typing import Final

from vpn_sentinel.runtime.settings import Idle

TUNNEL: Final = "tunnel"
REFERENCE: Final = "reference"

# For settings that a reference agent does not use.
NOT_FOR_REFERENCE: Final = Idle(disabled_by="ROLE", disables=lambda role: role.lower() == REFERENCE)
