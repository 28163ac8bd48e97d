"""The server: receives reports, judges them, keeps the history, and notifies people."""
