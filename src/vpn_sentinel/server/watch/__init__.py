"""What has no event and needs a timer: passed deadlines, old rows."""
