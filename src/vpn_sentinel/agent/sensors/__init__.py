"""What starts a round without being asked: pulses, the kernel's events, nameservers that change."""
