"""`resfuse doctor`: what this machine has for `make bench`, and what it lacks, on a page.

Nothing but the standard library is imported before a part is looked at: where a package is missing
the page says so.
"""
