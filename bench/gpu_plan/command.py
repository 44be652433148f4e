"""`resfuse gpu-plan`, once its arguments are parsed: survey, run the steps, write notes and report.

One survey serves all steps, where every `resfuse bench` would make its own: importing torch, waking
the GPU and measuring ceilings take some 20 s each time.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from resfuse.bench import results, sweep, timing
from resfuse.bench.case import PRECISIONS, Request
from resfuse.bench.console import stderr
from resfuse.bench.errors import UsageError
from resfuse.bench.gpu_plan import assembler, notes, progress
from resfuse.bench.gpu_plan.execute import TINY_TOLD, Plan, parse
from resfuse.bench.gpu_plan.steps import BUDGET_S, STEPS, Step
from resfuse.bench.isolate import survey
from resfuse.bench.kernels.check_command import SHEET as CONFIGS
from resfuse.bench.selection import pick


def gpu_plan(args: argparse.Namespace) -> int:
    """Runs the steps, or lists them; returns 1 if one of them failed."""
    names = pick("--steps", args.steps, [step.name for step in STEPS])
    steps = [step for step in STEPS if step.name in names]
    if args.list:
        print(listing(steps, args.budget))
        return 0
    console = stderr()
    watch = timing.Watch()
    root = args.results or _default_results(args.dry_run)
    results.check_writable(root)
    request = _request("cpu" if args.dry_run else "cuda")
    for step in steps:  # a slip in a command line is found now
        for line in step.commands:
            parse(line, args.dry_run)
    if args.dry_run:
        console.print(f"Dry run on the CPU: {TINY_TOLD}. Nothing here is a result.")
    with assembler.chosen() as assembled_by:
        return _go(args, steps, root, request, console, watch, assembled_by)


def _go(
    args: argparse.Namespace,
    steps: Sequence[Step],
    root: Path,
    request: Request,
    console: Console,
    watch: timing.Watch,
    assembled_by: str,
) -> int:
    """The plan itself, with every subprocess told of the assembler."""
    with console.status("Looking at this machine: device, versions, ceilings"):
        found = _survey(request, args.budget)
    console.print(assembled_by, highlight=False, soft_wrap=True)
    folder = root / found["folder"]
    results.check_writable(folder)
    results.check_writable(folder, CONFIGS)
    found = results.record_survey(folder, found)
    known = progress.load(folder, found["env_id"], found["commit"])
    if not args.resume:
        known.ended.clear()
    plan = Plan(found, folder, console, args.dry_run, args.resume)
    finished = progress.run(
        steps,
        known,
        plan.run_step,
        lambda: timing.seconds(watch.elapsed()),
        args.budget,
        lambda line: console.print(line, style="bold", highlight=False, soft_wrap=True),
    )
    _write_up(folder, console)
    if not finished:
        rest = ", ".join(s.name for s in steps if known.ended.get(s.name) != progress.DONE)
        console.print(f"Not done: {rest}. The same command with --resume goes on from here.")
    return int(any(known.ended.get(step.name) == progress.FAILED for step in steps))


def listing(steps: Sequence[Step], budget_s: float) -> str:
    """What `--list` shows: each step, its bound within the budget, its command lines."""
    bounds = [step.bound_s * budget_s / BUDGET_S for step in steps]
    lines = [f"{len(steps)} steps, at the most {sum(bounds):.0f} s. fp8 is left out."]
    for step, bound in zip(steps, bounds, strict=True):
        lines.append(f"\n{step.name}, {bound:.0f} s: {step.measures}")
        lines += [f"  resfuse {line}" for line in step.commands]
        lines += [] if step.commands else ["  what every command begins with"]
    return "\n".join(lines)


def _survey(request: Request, budget_s: float) -> dict:
    sweep.expand(replace(request, device="cpu"))
    try:
        return survey(request, 0, ceilings=True, limit_s=budget_s)
    except UsageError as error:
        raise UsageError(
            "gpu-plan needs a CUDA device, and torch finds none that works; "
            "`resfuse gpu-plan --dry-run` goes through every step on the CPU"
        ) from error


def _request(device: str) -> Request:
    """For the survey: which precisions' ceilings are wanted, and no user's files."""
    precisions = ["float32"] if device == "cpu" else list(PRECISIONS)
    return Request(
        profile="quick", device=device, models=["resnet50"], backends=["eager"], batch_sizes=[1],
        precisions=precisions, memory_formats=["contiguous"], modes=["inference"], img_size=None,
        baseline="eager", baseline_memory_format="contiguous", weights="seeded", images="bundled",
    )  # fmt: skip


def _default_results(dry_run: bool) -> Path:
    return Path(tempfile.mkdtemp(prefix="resfuse-dry-run-")) if dry_run else Path("results")


def _write_up(folder: Path, console: Console) -> None:
    """The report, and the notes if there are none yet."""
    from resfuse.bench.report import HTML, write_report

    if results.has_rows(folder):
        if (written := notes.write_if_missing(folder)) is not None:
            console.print(f"Notes: {written}", soft_wrap=True)
        console.print(f"Report: {write_report(folder)} and {HTML}", soft_wrap=True)
    console.print(f"Results: {folder}", soft_wrap=True)
