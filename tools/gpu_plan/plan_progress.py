"""Through the steps within a budget, and what is remembered of them between runs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resfuse.bench.common import json_file
from resfuse.bench.common.errors import UsageError
from resfuse.tools.gpu_plan.plan_steps import Step

FILE = "gpu-plan.json"
ENDINGS = DONE, CUT, FAILED = "done", "cut short", "failed"
Clock = Callable[[], float]  # seconds since the plan began
TimeLeft = Callable[[], float]
Runner = Callable[[Step, TimeLeft], str]  # takes a step as far as it goes -> DONE, CUT or FAILED
# Seconds that the rest of a step asks for before it is begun, and those it may have; the flag: what
# is left over is being shared out, and a step need not come to its end.
Needs = Callable[[Step, bool], tuple[float, float]]


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
        told = json_file.read(progress.file)
        if (told["env_id"], told["commit"]) == (env_id, commit):
            known = {name: how for name, how in told["steps"].items() if how in ENDINGS}
            progress.ended.update(known)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return progress


def in_order(steps: Sequence[Step], progress: Progress) -> list[Step]:
    """Returns what is not done, most valuable first; what has failed before comes last."""
    left = [step for step in steps if progress.ended.get(step.name) != DONE]
    return sorted(left, key=lambda step: progress.ended.get(step.name) == FAILED)


def run(
    steps: Sequence[Step],
    progress: Progress,
    run_step: Runner,
    needs: Needs,
    clock: Clock,
    budget_s: float,
    told: Callable[[str], None],
    after: Callable[[], None] = lambda: None,
) -> bool:
    """Takes each step that fits, most valuable first, up to its bound; then gives what is left over
    to unfinished ones whose work is kept, in the same order.

    A step that fails costs itself, not the others.

    Args:
        told: gets a line on each step.
        after: called after each step.

    Returns:
        whether all steps are done.

    Raises:
        UsageError: the results folder failed; the rows so far are kept.
    """
    order = in_order(steps, progress)
    failed: set[str] = set()
    for rest in (False, True):
        for step in order:
            if progress.ended.get(step.name) == DONE or step.name in failed:
                continue
            left = budget_s - clock()
            needed, bound = needs(step, rest)
            if left < needed:
                if not rest:
                    told(
                        f"{step.name}: left for later, it takes some {needed:.0f} s and "
                        f"{max(0.0, left):.0f} s are left"
                    )
                continue
            _take(step, progress, run_step, clock, min(left, bound), told)
            if progress.ended[step.name] == FAILED:
                failed.add(step.name)
            after()
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
    told(f"{step.name}: {step.measures}; {began:.0f} s so far, at the most {limit_s:.0f} s for it")
    try:
        how = run_step(step, lambda: limit_s - (clock() - began))
        why = {DONE: "done", CUT: "cut short, to be resumed", FAILED: "failed, see above,"}[how]
    except UsageError:
        raise
    except Exception as error:  # one step's trouble must not cost the others their turn
        how, why = FAILED, f"failed: {type(error).__name__}: {error},"
    progress.note(step.name, how)
    told(f"{step.name}: {why} after {clock() - began:.0f} s")
