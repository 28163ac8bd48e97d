"""Attacks on a server of this machine, and what they cost those who are watched."""
