"""A line of the page, and how bad what it says is."""

from collections.abc import Callable
from dataclasses import dataclass

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """One fact. `broken`: `make bench` cannot do its work; `note`: it can, with less."""

    name: str
    value: str
    state: str = OK


@dataclass(frozen=True)
class Part:
    """A part of the page; `look` finds its lines."""

    title: str
    look: Callable[[], list[Finding]]


def looked(part: Part) -> list[Finding]:
    """Returns what a part finds, or a line that says why it cannot look."""
    try:
        return part.look()
    except Exception as error:  # a broken installation may raise anything: that is what to show
        said = str(error).strip().splitlines() or [""]
        return [Finding("error", f"{type(error).__name__}: {said[0]}", BROKEN)]
