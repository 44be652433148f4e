"""From rows to what a page compares."""
