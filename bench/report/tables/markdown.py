"""Markdown that reads well as source too, and that foreign text cannot break."""

import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def escape(text: str) -> str:
    """Returns foreign text (a name, an error) on one line and escaped, without markup or HTML.

    An underscore inside a word is no markup on GitHub and stays as it is.
    """
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(lambda found: "\\" + found.group(), line)


def table(titles: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]]) -> str:
    """Returns a pipe table with padded cells.

    Args:
        titles: of the columns.
        right: for each column, whether it is aligned right.
        rows: cells, escaped by the caller.
    """
    widths = [max(3, *(len(row[i]) for row in [titles, *rows])) for i in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, right, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(titles), line(rule), *(line(row) for row in rows)])


def image(file_name: str, alt: str) -> str:
    return f"![{escape(alt)}]({file_name})"


def listing(names: Sequence[str]) -> str:
    """Returns "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def count(number: int, noun: str) -> str:
    """Returns "1 row", "2 rows"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
