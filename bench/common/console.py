"""Consoles that print text as it is: an error, a device or a folder may hold [/brackets], which
rich would take for markup of its own, drop or fail on.
"""

from rich.console import Console


def stdout(width: int | None = None) -> Console:
    """Returns the console for results.

    Args:
        width: in columns; the terminal's by default, 80 where there is none.
    """
    return Console(width=width, markup=False)


def stderr() -> Console:
    """Returns the console for messages of progress."""
    return Console(stderr=True, markup=False)
