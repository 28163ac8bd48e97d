"""The one transaction, from what enters to what is written: `decision.decide` is its pure core, `Tracker` runs it."""
