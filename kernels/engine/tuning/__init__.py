"""Checks and times candidates on the device at hand."""
