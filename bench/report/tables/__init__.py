"""Tables of the report, as markdown."""
