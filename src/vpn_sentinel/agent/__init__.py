"""The agent: runs in the VPN's network namespace, observes, keeps observations, and reports to the server."""
