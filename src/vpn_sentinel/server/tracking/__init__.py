"""The server's one transaction, from inputs to statements: `decision.decide` is its pure core, `Tracker` runs it."""
