"""kill -9 at every step of the server, and what is left after it. See `run`."""
