"""What counts as a candidate's own failure, and how it is told."""

import sys
import warnings

from resfuse.kernels.engine.ir.candidate import Candidate


def failures() -> tuple[type[Exception], ...]:
    """Returns the exceptions that count as a tactic's own failure: it is unsupported or cannot be
    compiled or run. All others are mistakes of resfuse, or the user's wish to stop.

    Triton's errors are looked up among what is loaded: without it they are not raised.
    """
    triton = sys.modules.get("triton.errors")
    return (RuntimeError, ValueError, *([triton.TritonError] if triton else []))


def described(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"


def warn_of(candidate: Candidate, key: str, what: str) -> None:
    warnings.warn(f"{candidate.label()} {what} on {key}", stacklevel=6)
