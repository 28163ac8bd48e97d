"""Tasks that run by a timer: passed deadlines, the clock, old rows, backups, overload."""
