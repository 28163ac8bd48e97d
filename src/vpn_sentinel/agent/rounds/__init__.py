"""When to look at everything, and one look at it."""
