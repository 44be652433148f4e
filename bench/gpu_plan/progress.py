"""Through the steps within a budget, and what is remembered of them between runs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resfuse.bench.errors import UsageError
from resfuse.bench.gpu_plan.steps import BUDGET_S, Step

FILE = "gpu-plan.json"
DONE, CUT, FAILED = "done", "cut short", "failed"
LEAST_S = 5.0  # a step is not begun with less
Clock = Callable[[], float]  # seconds since the plan began
Runner = Callable[[Step, Callable[[], float]], bool]  # step, time left -> came to its end


@dataclass
class Progress:
    """How each step ended in this environment, from these sources; on disk after every change."""

    file: Path
    env_id: str
    commit: str
    ended: dict[str, str] = field(default_factory=dict)

    def note(self, step: str, how: str) -> None:
        """Raises UsageError where the file cannot be written."""
        self.ended[step] = how
        told = {"env_id": self.env_id, "commit": self.commit, "steps": self.ended}
        temporary = self.file.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(told, indent=2) + "\n")
            temporary.replace(self.file)
        except OSError as error:
            raise UsageError(f"{self.file} cannot be written: {error.strerror or error}") from None


def load(folder: Path, env_id: str, commit: str) -> Progress:
    """What is known of the plan in a results folder; nothing where it was another environment's or
    other sources', or the file is damaged."""
    progress = Progress(folder / FILE, env_id, commit)
    try:
        told = json.loads(progress.file.read_text())
        if (told["env_id"], told["commit"]) == (env_id, commit):
            progress.ended.update({str(name): str(how) for name, how in told["steps"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return progress


def run(
    steps: Sequence[Step],
    progress: Progress,
    run_step: Runner,
    clock: Clock,
    budget_s: float,
    told: Callable[[str], None],
) -> bool:
    """Takes each step that is not done up to its bound, then again with whatever time is left.

    A step that fails costs itself, not the others.

    Args:
        run_step: takes a step as far as the time allows.
        told: gets a line on each step.

    Returns:
        whether all steps are done.

    Raises:
        UsageError: the results folder failed; the rows so far are kept.
    """
    for again in (False, True):
        for step in steps:
            ended = progress.ended.get(step.name)
            left = budget_s - clock()
            if ended == DONE or (again and ended == FAILED):
                continue
            if left < LEAST_S:
                progress.ended.setdefault(step.name, CUT)
                told(f"{step.name}: left out, no time is left")
                continue
            limit = left if again else min(left, step.bound_s * budget_s / BUDGET_S)
            _take(step, progress, run_step, clock, limit, told)
    return all(progress.ended.get(step.name) == DONE for step in steps)


def _take(
    step: Step,
    progress: Progress,
    run_step: Runner,
    clock: Clock,
    limit_s: float,
    told: Callable[[str], None],
) -> None:
    began = clock()
    told(f"{step.name}: {step.measures}; at the most {limit_s:.0f} s")
    try:
        finished = run_step(step, lambda: limit_s - (clock() - began))
    except UsageError:
        raise
    except Exception as error:  # one step's trouble must not cost the others their turn
        progress.note(step.name, FAILED)
        told(f"{step.name}: failed after {clock() - began:.0f} s: {type(error).__name__}: {error}")
        return
    progress.note(step.name, DONE if finished else CUT)
    how = "done" if finished else "cut short, to be resumed"
    told(f"{step.name}: {how} after {clock() - began:.0f} s")
