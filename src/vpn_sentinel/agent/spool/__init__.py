"""Observations that wait for the server, on disk."""
