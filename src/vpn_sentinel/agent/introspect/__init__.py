"""What the tunnel's own program reports. It adds evidence to the canaries, and never overrules them."""
