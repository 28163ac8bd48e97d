"""Cost figures, each beside a reference in one interleaved run. Machines are noisy: read medians and ratios."""
