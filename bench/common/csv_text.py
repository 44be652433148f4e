"""Text in a CSV file that no spreadsheet takes for a formula.

Excel and LibreOffice compute a cell that begins with = + - @, a tab or a line break, quoted or not
(OWASP, "CSV Injection"). Names and error messages come from other people's code, so such text gets
an apostrophe in front, which spreadsheets take as "this is text". Reading takes it away again.
Numbers, also as text ("-1.5"), compute to themselves and stay as they are.
"""

import csv
import io
import re
from collections.abc import Iterable

_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NEUTRAL = re.compile(r"'+[=+\-@\t\r\n]")


def line(cells: Iterable[object]) -> str:
    """Returns a line of a CSV file with its end; None and NaN become empty cells.

    A carriage return in a cell would end the line for most readers, and Python's csv quotes it only
    where the line's own end has one.
    """
    text = io.StringIO(newline="")
    plain = (None if cell != cell else cell for cell in cells)
    csv.writer(text, lineterminator="\r\n").writerow(plain)
    return text.getvalue().removesuffix("\r\n") + "\n"


def neutral(value: object) -> object:
    """Returns the text of a cell: what a spreadsheet would compute gets an apostrophe first."""
    if isinstance(value, str) and _FORMULA.match(value) and not _is_number(value):
        return "'" + value
    return value


def original(cell: object) -> object:
    """Returns what a cell that was read means; `original(neutral(x)) == x` for every x."""
    return cell[1:] if isinstance(cell, str) and _NEUTRAL.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
