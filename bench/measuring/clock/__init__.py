"""The only clock, and when to stop looking at it."""
