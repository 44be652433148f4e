"""rows.csv in; REPORT.md, DETAILS.md with its plots and report.html out."""

from resfuse.bench.report.report_page import HTML, write_merged_report, write_report, written

__all__ = ["HTML", "write_merged_report", "write_report", "written"]
