"""The DNS canary: an authoritative server for one zone, which tells agents which resolver asked for them."""
