"""Receives reports: keepalives, the agents' WebSocket and its POST fallback, and pulses by UDP."""
