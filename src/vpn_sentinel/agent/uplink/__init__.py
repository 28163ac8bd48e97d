"""Reports to the server: a session without I/O, and two transports for it."""
