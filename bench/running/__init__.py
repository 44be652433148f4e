"""Through the cases: a subprocess each, rows as they come, progress."""
