"""What went wrong, as a row tells it: a status and one sentence."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from resfuse.bench.common.errors import CannotServe, CannotTake, Unavailable
from resfuse.bench.measuring.clock.timing import Step
from resfuse.bench.measuring.correctness import WrongAnswer
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sample import Accuracy, Value

TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def outcome_of(error: Exception) -> Outcome:
    """Returns the outcome of a case in which `error` was raised; it has no speed."""
    if isinstance(error, Unavailable):
        of_model = isinstance(error, CannotTake)
        return Outcome("unavailable", _sentence(error), of_model=of_model)
    if isinstance(error, WrongAnswer):
        return Outcome("fail_accuracy", _sentence(error), _errors(error.accuracy))
    if isinstance(error, CannotServe):
        return Outcome("fail_to_run", _sentence(error))
    if isinstance(error, MemoryError):
        return Outcome("oom", _sentence(error) or "out of memory")
    status = "oom" if _is_out_of_memory(error) else "fail_to_run"
    said = f"{type(error).__name__}: {_sentence(error)}"
    return Outcome(status, said, again=_broke_the_device(error))


@contextmanager
def blame(baseline: str) -> Iterator[None]:
    """The baseline's wrong answer is not the candidate's: it stops the case under its own name."""
    try:
        yield
    except (WrongAnswer, CannotTake) as error:
        raise RuntimeError(f"the baseline ({baseline}) gave a wrong answer: {error}") from error


def blamed(step: Step, baseline: str) -> Step:
    """Returns the baseline's step, which reports its wrong answers under its own name."""

    def verify(output: Any) -> None:
        with blame(baseline):
            step.verify(output)

    return replace(step, verify=verify)


def _broke_the_device(error: BaseException | None) -> bool:
    """Tells whether the engine has barred what broke the device: a new process may then succeed.

    The error's class is looked up among loaded modules: without an engine it is never raised.
    """
    engine = sys.modules.get("resfuse.kernels.engine.tuning.tuner")
    while engine is not None and error is not None:
        if isinstance(error, engine.BrokenDevice):
            return True
        error = error.__cause__
    return False


def _errors(accuracy: Accuracy | None) -> dict[str, Value]:
    """Returns the metrics that are known of a wrong answer."""
    if accuracy is None:
        return {}
    return {
        "rel_l2_err": accuracy.rel_l2,
        "max_abs_err": accuracy.max_abs,
        "err_vs_eager": accuracy.err_vs_eager,
        "sqnr_db": accuracy.sqnr_db,
        "kl": accuracy.kl,
    }


def _is_out_of_memory(error: Exception) -> bool:
    said = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "allocate memory" in said
        or "not enough memory" in said
    )


def _sentence(error: BaseException) -> str:
    """Returns the first line of an exception's message and of its cause's, short enough for a
    table."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    first = _first_line(error)
    return first if root is error else f"{first} ({type(root).__name__}: {_first_line(root)})"


def _first_line(error: BaseException) -> str:
    lines = [
        line.strip() for line in TERMINAL_COLOURS.sub("", str(error)).splitlines() if line.strip()
    ]
    return lines[0][:250] if lines else ""
