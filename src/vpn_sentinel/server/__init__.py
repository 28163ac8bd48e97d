"""The server: takes reports, judges them, remembers, and tells people."""
