"""What the subcommands do, once their arguments are parsed."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from resfuse.bench import results, sweep
from resfuse.bench.case import Case, Options
from resfuse.bench.errors import UsageError
from resfuse.bench.isolate import run_case, survey
from resfuse.bench.kernels.row import SHEET as KERNEL_SHEET
from resfuse.bench.listing import LISTS, cases_table
from resfuse.bench.row import Outcome
from resfuse.bench.selection import pick


def bench(args: argparse.Namespace, measure: sweep.Measure = run_case) -> int:
    """`resfuse bench`: survey the machine, run the cases, write the report.

    Args:
        measure: what measures a case.
    """

    console = Console(stderr=True)
    request = request_of(args)
    sweep.expand(replace(request, device="cpu"))  # finds misspelt names before anything runs
    if not args.dry_run:
        results.check_writable(args.results)
    with console.status("Looking at this machine: device, versions, ceilings"):
        found = survey(request, args.threads, ceilings=not args.dry_run)
    request = replace(request, device=found["device"])
    cases = sweep.expand(request)
    folder = args.results / found["folder"]
    skipped = 0
    if args.resume:
        remaining = sweep.unsettled(cases, folder, found)
        skipped, cases = len(cases) - len(remaining), remaining
    if args.dry_run:
        Console().print(cases_table(cases, skipped))
        return 0
    results.record_environment(folder, found["env_id"], {**found["facts"], **found["ceilings"]})
    console.print(
        f"{found['facts']['device_name']}: {len(cases)} cases"
        + (f", {skipped} already settled" if skipped else "")
    )
    run_cases(cases, options_of(args, request), folder, found, console, measure=measure)
    if not args.no_report:
        from resfuse.bench.report import write_report

        console.print(f"Report: {write_report(folder)}")
    return 0


def report(args: argparse.Namespace) -> int:
    """`resfuse report`: from rows to pages, without measuring anything."""
    from resfuse.bench.report import write_merged_report, write_report

    folders = _results_folders(args.results)
    if args.out is not None:
        print(write_merged_report(folders, args.out))
        return 0
    for folder in folders:
        print(write_report(folder))
    return 0


def list_registry(args: argparse.Namespace) -> int:
    """`resfuse list [what]`: the registries as tables."""
    console = Console()
    for what in [args.what] if args.what else LISTS:
        console.print(LISTS[what]())
    return 0


def study(args: argparse.Namespace) -> int:
    """`resfuse study NAME`."""
    from resfuse.bench.studies import load_study

    print(load_study(args.name)(args.results, args.device))
    return 0


def inspect(args: argparse.Namespace) -> int:
    """`resfuse inspect`: what the kernels compile to; 1 if one of them should not ship so."""
    from resfuse.bench.inspection import summary, table, write_csv
    from resfuse.kernels.inspect import inspect as compile_all
    from resfuse.kernels.inspect import problems, require_compiler
    from resfuse.kernels.registry import KERNELS
    from resfuse.kernels.targets import DEFAULT_TARGETS, TARGETS

    kernels = pick("--kernel", args.kernel, list(KERNELS))
    targets = pick("--target", args.target or DEFAULT_TARGETS, list(TARGETS))
    if args.csv is not None and not args.csv.parent.is_dir():
        raise UsageError(f"argument --csv: {args.csv.parent} is no folder")
    try:
        require_compiler()
    except RuntimeError as error:
        raise UsageError(str(error)) from None
    found = []
    with Console(stderr=True).status("Compiling") as status:
        for result in compile_all(kernels, targets):
            found.append(result)
            status.update(f"Compiling: {len(found)} done, {result.kernel} {result.target}")
    piped = None if sys.stdout.isatty() else 160  # columns: rich takes 80, and breaks the labels
    Console(width=piped).print(table(found))
    for line in summary(found):
        Console().print(line, highlight=False, soft_wrap=True)
    if args.csv is not None:
        write_csv(found, args.csv)
    return int(any(problems(result) for result in found))


def request_of(args: argparse.Namespace) -> sweep.Request:
    """What the parsed flags of `resfuse bench` ask for.

    Raises:
        UsageError: several processes were asked for, and there is one.
    """
    if args.parallel and not args.world_size:
        raise UsageError(
            f"argument --parallel: {args.parallel} needs processes started by torchrun: "
            "torchrun --nproc-per-node N -m resfuse.bench bench --bench train ..."
        )
    return sweep.Request(
        profile=args.profile,
        device=args.device,
        models=args.model,
        backends=args.backend,
        batch_sizes=args.batch_size,
        precisions=args.precision,
        memory_formats=args.memory_format or [],
        modes=args.bench,
        img_size=args.img_size,
        baseline=args.baseline,
        baseline_memory_format=args.baseline_memory_format,
        weights=args.weights,
        images=args.images,
        parallel=args.parallel or "",
        world_size=args.world_size or 1,
    )


def options_of(args: argparse.Namespace, request: sweep.Request) -> Options:
    return Options(
        seconds=args.seconds or sweep.profile(request).seconds,
        threads=args.threads,
        seed=args.seed,
        timeout_s=args.timeout,
    )


def run_cases(
    cases: list[Case],
    options: Options,
    folder: Path,
    found: dict[str, Any],
    console: Console,
    time_left: Callable[[], float] = lambda: inf,
    measure: sweep.Measure = run_case,
) -> int:
    """Measures cases with a progress bar; returns how many `time_left` (sweep.run) left out."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    counts: Counter[str] = Counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))

        def started(case: Case) -> None:
            progress.update(task, description=case.label())

        def finished(case: Case, outcome: Outcome) -> None:
            counts[outcome.status] += 1
            # An error may hold [/brackets], which rich would take for markup of its own.
            line = _line(case, outcome)
            progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
            progress.advance(task)

        left_out = sweep.run(cases, options, folder, found, started, finished, time_left, measure)
    summary = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    console.print(
        f"{sum(counts.values())} rows in {folder / results.ROWS}: {summary}"
        if counts
        else "No case was measured."
        if left_out
        else "Nothing left to measure."
    )
    return left_out


def _line(case: Case, outcome: Outcome) -> str:
    """A case's result as one line: what a reader wants to know before the report is there."""
    if outcome.status != "pass":
        return f"{case.label():<58} {outcome.status}: {outcome.error}"
    speed = outcome.metrics["infer_samples_per_sec"] or outcome.metrics["train_samples_per_sec"]
    low, mid, high = (
        outcome.metrics[name] for name in ("speedup_ci_low", "speedup", "speedup_ci_high")
    )
    return f"{case.label():<58} {speed:8.1f} images/s  {mid:.2f}x [{low:.2f}, {high:.2f}]"


def _results_folders(given: list[Path]) -> list[Path]:
    """Folders with rows of either kind: each given one, or else those in it."""
    sheets = (results.ROWS, KERNEL_SHEET.file)
    folders = []
    for folder in given:
        inside = (
            [folder]
            if any((folder / sheet).exists() for sheet in sheets)
            else sorted({path.parent for sheet in sheets for path in folder.glob(f"*/{sheet}")})
        )
        if not inside:
            raise UsageError(
                f"argument --results: no {results.ROWS} in {folder} or in a folder of it; "
                "`resfuse bench` makes one"
            )
        folders += inside
    return folders
