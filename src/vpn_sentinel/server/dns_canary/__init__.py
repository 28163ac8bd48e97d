"""The DNS canary: an authoritative server for one zone, whose answers show agents which resolver asked for them."""
