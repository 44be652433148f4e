"""Tactics on the CPU: native programs and oneDNN."""
