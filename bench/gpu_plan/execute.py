"""Runs a step's command lines as `resfuse` itself would, within the time that is left."""

import argparse
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from resfuse.bench import cli, isolate, sweep
from resfuse.bench.bench_command import options_of, request_of, run_cases
from resfuse.bench.gpu_plan.progress import LEAST_S
from resfuse.bench.gpu_plan.steps import Step
from resfuse.bench.kernels.check_command import check_configs, kernels_of
from resfuse.bench.row import Outcome

TimeLeft = Callable[[], float]
# What a dry run has instead of the real thing; the code that runs is the same.
TINY: dict[str, Any] = {
    "device": "cpu", "img_size": 32, "batch_size": [2], "seconds": 0.05, "time": 0.05,
}  # fmt: skip
TINY_MODEL, TINY_PRECISION = "resnet18", "float32"
TINY_TOLD = f"{TINY_MODEL} in {TINY_PRECISION} at 32 pixels, two images, stands for every network"


def parse(line: str, dry_run: bool) -> argparse.Namespace:
    """A command line as the command sees it, made tiny for a dry run."""
    args = cli.parser().parse_args(shlex.split(line))
    if dry_run:
        given = vars(args)
        given.update({name: value for name, value in TINY.items() if name in given})
        for name, tiny in (("model", TINY_MODEL), ("precision", TINY_PRECISION)):
            if name in given:
                given[name] = [tiny] if isinstance(given[name], list) else tiny
    return args


@dataclass
class Plan:
    """Where the steps run and where their rows go."""

    found: dict[str, Any]  # isolate.survey
    folder: Path
    console: Console
    dry_run: bool
    resume: bool
    _begun: set[str] = field(default_factory=set)

    def run_step(self, step: Step, time_left: TimeLeft) -> bool:
        """Whether every command of the step came to its end; what it settled is not done again."""
        again = self.resume or step.name in self._begun
        self._begun.add(step.name)
        if not step.commands:
            facts = {**self.found["facts"], **self.found["ceilings"]}
            self.console.print(
                ", ".join(f"{k} {v}" for k, v in facts.items()), highlight=False, soft_wrap=True
            )
            return True
        commands = []
        for line in step.commands:
            args = parse(line, self.dry_run)
            if args not in commands:  # a dry run makes some of them the same
                commands.append(args)
        finished = [COMMANDS[args.command](self, args, again, time_left) for args in commands]
        return all(finished)

    def bench(self, args: argparse.Namespace, again: bool, time_left: TimeLeft) -> bool:
        request = replace(request_of(args), device=self.found["device"])
        cases = sweep.expand(request)
        if again:
            cases = sweep.unsettled(cases, self.folder, self.found)
        options = options_of(args, request)
        return not run_cases(cases, options, self.folder, self.found, self.console, time_left)

    def check(self, args: argparse.Namespace, again: bool, time_left: TimeLeft) -> bool:
        kernels = kernels_of(args)
        _, finished = check_configs(
            kernels, self.folder, self.found, self.console, again, time_left
        )  # fmt: skip
        return finished

    def engine(self, args: argparse.Namespace, again: bool, time_left: TimeLeft) -> bool:
        from resfuse.bench import engine_command

        args.device = "cpu"  # looked up here, where the device must not be touched
        case = replace(engine_command.case_of(args), device=self.found["device"])
        files = {n: self.folder / f"engine-{case.model}-b{n}.txt" for n in args.batch_size}
        if time_left() < LEAST_S:
            return False
        options = engine_command.options_of(args)
        job = {"case": asdict(case), "batch_sizes": args.batch_size, "options": asdict(options)}
        told = isolate.describe_engine(job, time_left())
        if isinstance(told, Outcome):
            if told.status == "timeout":
                return False
            raise RuntimeError(told.error)
        for batch_size, file in files.items():
            text = told["texts"][str(batch_size)]
            temporary = file.with_suffix(".tmp")
            temporary.write_text(f"{text}\n\nenvironment {self.found['env_id']}, "
                                 f"commit {self.found['commit']}\n")  # fmt: skip
            temporary.replace(file)
            self.console.print(f"{file}: {text.splitlines()[-1]}", highlight=False, soft_wrap=True)
        return True


COMMANDS: dict[str, Callable[[Plan, argparse.Namespace, bool, TimeLeft], bool]] = {
    "bench": Plan.bench,
    "check": Plan.check,
    "engine": Plan.engine,
}
