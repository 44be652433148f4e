"""Runs a step's command line as `resfuse` itself would, within the time that is left."""

import argparse
import functools
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from resfuse.bench import cli
from resfuse.bench.layers.kernel_check.check_command import check_configs, kernels_of, math_modes_of
from resfuse.bench.records import results
from resfuse.bench.records.case import Case
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running import sweep
from resfuse.bench.running.profiles import LEAST_S
from resfuse.bench.running.session import options_of, request_of, run_cases
from resfuse.tools.gpu_plan import costs, questions
from resfuse.tools.gpu_plan.means import Means
from resfuse.tools.gpu_plan.plan_progress import CUT, DONE, FAILED, TimeLeft
from resfuse.tools.gpu_plan.plan_steps import PROBE, Step

# What a dry run has instead of the real thing; the code that runs is the same.
TINY: dict[str, Any] = {
    "device": "cpu", "img_size": 32, "batch_size": [2], "seconds": 0.05,
}  # fmt: skip
TINY_MODEL, TINY_PRECISION = "resnet18", "float32"
TINY_TOLD = (
    f"{TINY_MODEL} in {TINY_PRECISION}, or int8, at 32 pixels, two images, stands for every network"
)


def parse(line: str, dry_run: bool) -> argparse.Namespace:
    """A command line as the command sees it, made tiny for a dry run."""
    args = cli.parser().parse_args(shlex.split(line))
    if dry_run:
        given = vars(args)
        given.update({name: value for name, value in TINY.items() if name in given})
        for name, tiny in (("model", TINY_MODEL), ("precision", TINY_PRECISION)):
            if name in given and given[name] not in ("int8", ["int8"]):  # a CPU computes in it, too
                given[name] = [tiny] if isinstance(given[name], list) else tiny
    return args


@functools.cache
def cases_of(step: Step, device: str, dry_run: bool = False) -> tuple[Case, ...]:
    """The cases of a step that measures networks; none of another."""
    if step.line == PROBE:
        return ()
    args = parse(step.line, dry_run)
    if args.command != "bench":
        return ()
    return tuple(sweep.expand(replace(request_of(args), device=device)))


def expected_s(step: Step) -> float:
    """Returns the seconds that a whole step takes on an H200."""
    return step.cost_s + sum(costs.cost(case).expected_s for case in cases_of(step, "cuda"))


def bound_s(step: Step) -> float:
    """After how long it is given up."""
    return step.bound_s + sum(costs.cost(case).bound_s for case in cases_of(step, "cuda"))


@dataclass
class Plan:
    """Where the steps run and where their rows go. `kept` is called after every row."""

    found: dict[str, Any]  # survey.py
    folder: Path
    console: Console
    means: Means
    dry_run: bool
    resume: bool
    kept: Callable[[], None] = lambda: None
    _begun: set[str] = field(default_factory=set)
    _settled: set[Case] = field(default_factory=set)

    def needs(self, step: Step, rest: bool) -> tuple[float, float]:
        """Returns what a step's cheapest unsettled case takes (see plan_progress.Needs)."""
        if self.dry_run:
            return LEAST_S, bound_s(step)
        cases = self._left(step)
        if not cases:
            return (LEAST_S if rest else step.cost_s), step.bound_s or LEAST_S
        bound = sum(costs.cost(case).bound_s for case in cases)
        return min(self._needs(case, rest) for case in cases), bound

    def run_step(self, step: Step, time_left: TimeLeft) -> str:
        """Runs a step and returns how far it came: what it settled is not done again."""
        again = self.resume or step.name in self._begun
        rest = step.name in self._begun
        self._begun.add(step.name)
        if step.line == PROBE:
            return self._probe(again, time_left)
        args = parse(step.line, self.dry_run)
        if args.command == "check":
            return self._check(args, again, time_left)
        return self._bench(args, self._left(step), rest, time_left)

    def _left(self, step: Step) -> list[Case]:
        """Its cases that this plan has not settled yet, nor, with --resume, one before it. A dry
        run makes some steps the same."""
        cases = list(cases_of(step, self.found["device"], self.dry_run))
        if self.resume:
            cases = sweep.unsettled(cases, self.folder, self.found)
        return [case for case in cases if case not in self._settled]

    def _needs(self, case: Case, rest: bool) -> float:
        if case.backend in self.found.get("unavailable", {}):
            return 0.0
        if self.dry_run:
            return LEAST_S
        enough = costs.cost(case).expected_s
        return min(enough, costs.KEPT_S) if rest and case.backend in costs.KEPT else enough

    def _bench(
        self, args: argparse.Namespace, cases: list[Case], rest: bool, time_left: TimeLeft
    ) -> str:
        options = options_of(args, replace(request_of(args), device=self.found["device"]))
        left_out, lost = 0, 0

        def heard(case: Case, outcome: Outcome) -> None:
            nonlocal lost
            if outcome.status in results.SETTLED:
                self._settled.add(case)
            else:
                lost += 1
            self._keep_explanation(case, outcome)
            self.kept()

        for case in cases:
            bound = min(options.timeout_s, costs.cost(case).bound_s)
            left_out += run_cases(
                [case],
                replace(options, timeout_s=bound),
                self.folder,
                self.found,
                self.console,
                time_left,
                self.means.measure,
                lambda case: self._needs(case, rest),
                heard,
            )
        return CUT if left_out else FAILED if lost else DONE

    def _keep_explanation(self, case: Case, outcome: Outcome) -> None:
        """engine-<network>-b<batch>.txt: where the time goes, from the process that measured it."""
        if not outcome.explanation:
            return
        file = self.folder / f"{case.backend}-{case.model}-{case.precision}-b{case.batch_size}.txt"
        temporary = file.with_suffix(".tmp")
        where = f"environment {self.found['env_id']}, commit {self.found['commit']}"
        temporary.write_text(f"{case.label()}\n\n{outcome.explanation}\n\n{where}\n")
        temporary.replace(file)

    def _check(self, args: argparse.Namespace, again: bool, time_left: TimeLeft) -> str:
        _, finished = check_configs(
            kernels_of(args), math_modes_of(args), self.folder, self.found, self.console, again,
            time_left, self.means.trials,
        )  # fmt: skip
        return DONE if finished else CUT

    def _probe(self, again: bool, time_left: TimeLeft) -> str:
        finished = questions.ask_all(
            self.folder, self.found, self.console, again, time_left, self.means.probe
        )
        return DONE if finished else CUT
