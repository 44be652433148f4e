"""Finding: a line of the doctor's page and how serious it is."""

from collections.abc import Callable
from dataclasses import dataclass

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """A fact. With state `broken` `make bench` cannot work, with `note` it can do less."""

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
