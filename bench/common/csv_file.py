"""A CSV file that is read back: every line has as many cells as there are columns, and a number
where one belongs. One that has not is left out, with a warning that names it.

A digit that became another cannot be seen: rows are plain text, for people to read and to edit.
"""

import csv
import io
import re
import stat
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from resfuse.bench.common.errors import LeftOutWarning, UsageError
from resfuse.kernels.tuning_cache.regular_file import read_regular

MOST_BYTES = 64 << 20  # ten thousand rows of a sweep take 7 MB
_PIPES = Path("/dev/fd")  # where a shell's <(...) stands
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?|nan", re.I | re.A)

# What is wrong with a line's cells, or "".
Check = Callable[[Sequence[str], Sequence[str]], str]


def read(
    path: Path,
    check: Check = lambda header, cells: "",
    only_whole: bool = False,
    strict: bool = False,
) -> pd.DataFrame:
    """Returns the cells of a file as text; the index is a line's position among its rows, from 0.

    Args:
        check: told the columns and a line's cells; a line that it has something to say against is
            left out.
        only_whole: leaves out a last line without an end: a crash may have cut it off. One cut off
            within quotes is always left out, since no reader gets past it.
        strict: raises where another line would be left out.

    Raises:
        UsageError: it is no CSV file, or too large; two of its columns have one name.
        OSError: it cannot be read.
    """
    data = _content(path)
    whole = whole_lines(data) if only_whole or data.count(b'"') % 2 else len(data)
    left_out = []
    if hidden := _hidden_line(data, whole):
        left_out.append(f"line {hidden} and what follows: a quotation mark is not closed")
    lines, places = list[list[str]](), list[int]()
    cells = list[str]()
    limit = csv.field_size_limit(MOST_BYTES)
    try:
        reader = csv.reader(io.StringIO(data[:whole].decode("utf-8-sig"), newline=""))
        header = next(reader)
        begun = reader.line_num + 1
        for number, cells in enumerate(cells for cells in reader if cells):
            if wrong := _wrong(header, cells, check):
                left_out.append(f"line {begun}: {wrong}")
            else:
                lines.append(cells)
                places.append(number)
            begun = reader.line_num + 1
    except StopIteration:
        raise UsageError(f"results file {path} cannot be read as CSV: it is empty") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"results file {path} cannot be read as CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    cut_off = whole == len(data) and not data.endswith((b"\n", b"\r"))
    if cut_off and cells and len(cells) < len(header):
        left_out.pop()  # not damaged: it was being written, as its missing cells say
        lines.append(cells + [""] * (len(header) - len(cells)))
        places.append(number)
    if twice := [name for name in dict.fromkeys(header) if name and header.count(name) > 1]:
        raise UsageError(f"results file {path} has two columns {', '.join(twice)}")
    if left_out and strict:
        raise UsageError(f"results file {path} is damaged in {left_out[0]}; mend it")
    if left_out:
        _warn(path, left_out)
    return pd.DataFrame(lines, index=places, columns=header, dtype=object)


def header_of(path: Path, data: bytes) -> list[str]:
    """Returns the columns of a file that begins with `data`."""
    try:
        return next(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"results file {path} cannot be read as CSV: {error}") from None


def number_in(cell: str) -> float | None:
    """Returns the number in a cell, None if it is no number."""
    return float(cell) if _NUMBER.fullmatch(cell) else None


def whole_lines(data: bytes) -> int:
    """Returns how many bytes of a CSV are whole lines; a line break within quotes ends none."""
    end = start = quotes = 0
    while stop := data.find(b"\n", start) + 1:
        quotes += data.count(b'"', start, stop)
        if quotes % 2 == 0:
            end = stop
        start = stop
    return end


def hides_rows(data: bytes, whole: int) -> bool:
    """Tells whether more than one line that was cut off follows the whole lines: lines that a stray
    quotation mark swallows."""
    return bool(_hidden_line(data, whole))


def _hidden_line(data: bytes, whole: int) -> int:
    """Returns the number of the line whose quotation mark swallows whole lines, 0 without one."""
    columns = data[: data.find(b"\n") + 1].count(b",")
    swallowed = data[whole:].split(b"\n")[1:]
    if columns and any(line.count(b",") >= columns for line in swallowed):
        return data.count(b"\n", 0, whole) + 1
    return 0


def _wrong(header: Sequence[str], cells: Sequence[str], check: Check) -> str:
    if len(cells) != len(header):
        return f"{len(cells)} cells for {len(header)} columns"
    swallowed = (line for cell in cells if "\n" in cell for line in cell.split("\n"))
    if any(line.count(",") >= len(header) - 1 for line in swallowed):
        return "a quotation mark swallows the next lines"
    return check(header, cells)


def _content(path: Path) -> bytes:
    if path.parent == _PIPES and stat.S_ISFIFO(path.stat().st_mode):
        with path.open("rb") as pipe:
            data = pipe.read(MOST_BYTES + 1)
        if len(data) <= MOST_BYTES:
            return data
    return read_regular(path, MOST_BYTES)


def _warn(path: Path, left_out: Sequence[str]) -> None:
    more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    examples = "; ".join(left_out[:3])
    warnings.warn(f"{path}: left out {examples}{more}", LeftOutWarning, stacklevel=5)
