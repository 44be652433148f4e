"""The rewritten forward of a module, and when it may run."""
