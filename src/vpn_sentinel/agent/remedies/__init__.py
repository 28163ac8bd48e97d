"""What the agent may do about a tunnel besides telling: commands of the owner's, gluetun, torrent clients."""
