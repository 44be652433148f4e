"""Turns rows into what a page compares."""
