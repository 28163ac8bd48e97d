"""What takes reports: keepalives, the agents' WebSocket and its POST fallback, and the UDP echo."""
