"""The plans of an engine, one for each shape of its input: kept, run in turns, added to."""
