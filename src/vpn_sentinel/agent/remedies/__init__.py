"""What the agent may do about a tunnel besides reporting: the owner's command, gluetun, torrent clients."""
