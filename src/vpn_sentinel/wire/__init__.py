"""Everything that crosses a process boundary: messages, limits, the UDP echo, the replaced system's keepalive."""
