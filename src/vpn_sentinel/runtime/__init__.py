"""Process plumbing. Knows nothing of VPNs."""
