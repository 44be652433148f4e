"""rows.csv in; REPORT.md and its plots out."""

from resfuse.bench.report.page import write_merged_report, write_report

__all__ = ["write_merged_report", "write_report"]
