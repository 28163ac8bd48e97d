"""How soon others would find the same faults, side by side on the same tunnels."""
