"""Engines on disk: written, read, and checked as a stranger's file."""
