"""The way to the server: a session without I/O, and the two transports that carry it."""
