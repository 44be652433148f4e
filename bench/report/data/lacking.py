"""Packages that the pages want and a rented machine may lack: rows are reported without them."""

from importlib.util import find_spec

DRAWING = ("matplotlib",)
PAGE = ("jinja2", "plotly", "matplotlib")  # of report.html, whose axes are the plots' own


def lacking(packages: tuple[str, ...]) -> str:
    """Returns the packages that are not installed, as "one and another"; "" where all are."""
    return " and ".join(name for name in packages if find_spec(name) is None)
