"""Measures one case in this process: build, check, time, check again, probe."""
