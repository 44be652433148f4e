"""Plots of the report, a file each."""
