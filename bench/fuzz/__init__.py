"""Malformed input for everything that reads what others write. `targets` is the table, `run` goes through it."""
