"""Errors, consoles, selections, statistics: what every part of the harness uses."""
