"""Measure, check, report: `resfuse bench`. Importing this package imports nothing heavy."""
