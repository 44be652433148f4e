"""The engine: whole networks compiled for one shape and device; see engine.py."""
