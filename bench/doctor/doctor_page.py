"""The page as text: plain where it is piped, with colours on a terminal that rich can serve."""

import shutil
import sys
import textwrap

from resfuse.bench.common.finding import BROKEN, NOTE, OK, Finding

MARKS = {OK: " ", NOTE: "!", BROKEN: "x"}
COLOURS = {OK: "", NOTE: "yellow", BROKEN: "bold red"}
NAME = 15  # columns
PIPED = 160
NARROWEST = 60


def show(title: str, findings: list[Finding]) -> None:
    """Prints a part at once, since the next one may take a while."""
    _print(title, "bold")
    for finding in findings:
        for line in lines(finding, _columns()):
            _print(line, COLOURS[finding.state])


def close(found: list[Finding]) -> int:
    """Prints what it comes to; returns the exit code."""
    broken = [finding for finding in found if finding.state == BROKEN]
    notes = sum(finding.state == NOTE for finding in found)
    if not broken:
        note = f" {notes} lines marked ! say what will be missing or noisy." if notes else ""
        _print(f"All that `make bench` needs is here.{note}", "bold green")
        return 0
    names = ", ".join(dict.fromkeys(finding.name or "error" for finding in broken))
    _print(f"`make bench` cannot do its work here: see {names}, marked x.", COLOURS[BROKEN])
    return 1


def lines(finding: Finding, width: int) -> list[str]:
    """Returns a finding as lines, wrapped within its own column."""
    head = f"{MARKS[finding.state]} {finding.name:<{NAME}} "
    return textwrap.wrap(
        head + finding.value, width, subsequent_indent=" " * len(head), break_long_words=False,
        break_on_hyphens=False, drop_whitespace=True,
    )  # fmt: skip


def _columns() -> int:
    return max(NARROWEST, shutil.get_terminal_size((PIPED, 24)).columns) if _tty() else PIPED


def _tty() -> bool:
    return sys.stdout.isatty()


def _print(text: str, style: str) -> None:
    if not _tty():
        print(text)
        return
    try:
        from resfuse.bench.common.console import stdout
    except ImportError:
        print(text)
        return
    stdout().print(text, style=style or None, highlight=False, soft_wrap=True)
