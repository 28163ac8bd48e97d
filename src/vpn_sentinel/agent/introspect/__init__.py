"""What the tunnel's own program says of it. Evidence beside the canaries, never against them."""
