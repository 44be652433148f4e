"""Modules by the names they had until 0.1: `resfuse.bench` finds them as its own."""
