"""When to run a round, and one round."""
