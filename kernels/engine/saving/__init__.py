"""Engines on disk: written, read and checked, since a file is not trusted."""
