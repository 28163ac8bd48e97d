"""Observations on their way to the server, on disk."""
