"""An engine's graph as a file for other runtimes."""
