"""rows.csv as one self-contained HTML page: report.html, which opens offline."""
