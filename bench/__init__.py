"""Measure, check, report: `resfuse bench`. Importing this package imports nothing heavy."""

__path__.append(f"{__path__[0]}/cli/deprecated")  # modules by the names they had until 0.1
