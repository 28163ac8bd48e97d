"""What starts a round without being asked: the kernel's events and the beat of the canary."""
