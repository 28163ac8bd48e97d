"""What can and cannot be seen from this place, and how to fix it."""
