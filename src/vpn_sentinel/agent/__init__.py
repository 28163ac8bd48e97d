"""Lives inside the VPN's network namespace: looks, keeps what it saw, and tells the server."""
