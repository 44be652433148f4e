"""Resolves the names a user gives: wildcards over a registry, a sentence for the rest."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from resfuse.bench.common.errors import UsageError


def pick(
    argument: str, patterns: Sequence[str], known: Sequence[str], shown_by: str = ""
) -> list[str]:
    """All known names that match any of the patterns (`resnet*`), in the order of `known`, each
    once.

    Args:
        shown_by: the command that lists them, where they are too many for a sentence.

    Raises:
        UsageError: a pattern matches nothing; names the argument, the pattern and what is accepted.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise unknown(argument, pattern, known, shown_by)
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]


def unknown(argument: str, pattern: str, known: Sequence[str], shown_by: str = "") -> UsageError:
    """What to raise where a pattern matches nothing; near names are offered."""
    near = _near(pattern, known)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    names = f"known: {', '.join(known)}"
    if shown_by:
        names = f"`{shown_by}` shows the {len(known)} that are known"
    return UsageError(f"argument {argument}: unknown name '{pattern}'; {hint}{names}")


def _near(pattern: str, known: Sequence[str]) -> list[str]:
    """Returns at most three names that are spelled alike, or that have the pattern in them."""
    within = [name for name in known if fnmatchcase(name, f"*{pattern}*")]
    return get_close_matches(pattern, known, n=3) or within[:3]


def pick_one(argument: str, name: str, known: Sequence[str], shown_by: str = "") -> str:
    """The one known name that matches; raises UsageError for none, or several."""
    found = pick(argument, [name], known, shown_by)
    if len(found) > 1:
        raise UsageError(f"argument {argument}: '{name}' stands for {len(found)} names; give one")
    return found[0]
