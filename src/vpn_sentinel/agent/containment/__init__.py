"""Blocks traffic outside the tunnel after a leak, by rules that stay in the kernel."""
