"""Closing the ways out beside the tunnel when it leaks, by rules that stay in the kernel."""
