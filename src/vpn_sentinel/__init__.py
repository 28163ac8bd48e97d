"""Watches VPN tunnels and tells at once when one leaks, dies or goes quiet."""

__version__ = "2.0.0.dev0"
