"""`resfuse kernels`, once its arguments are parsed: survey the machine, measure, report."""

import argparse
import sys
from collections import Counter
from dataclasses import replace
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
from rich.table import Table

from resfuse.bench.backends.providers import BASELINE, PROVIDERS
from resfuse.bench.common.console import stderr, stdout
from resfuse.bench.common.csv_text import line, neutral
from resfuse.bench.common.selection import pick
from resfuse.bench.layers import layer_sweep
from resfuse.bench.layers.layer_sweep import Row
from resfuse.bench.records import results
from resfuse.bench.records.case import Options, Request
from resfuse.bench.records.convolutions import Convolution
from resfuse.bench.records.layer_row import SHEET

ROUNDS = {"cpu": 20, "cuda": 100}


def kernels(args: argparse.Namespace) -> int:
    """Measures every distinct convolution of the models; returns the exit code."""
    from resfuse.bench.running.survey import survey

    console = stderr()
    request = _request(args)
    providers = pick("--providers", args.providers or ["*"], list(PROVIDERS))
    layer_sweep.expand(replace(request, device="cpu"))  # finds misspelt names before anything runs
    if not args.dry_run:
        results.check_writable(args.results)
    with console.status("Looking at this machine: device, versions, ceilings"):
        found = survey(request, args.threads, ceilings=not args.dry_run)
    request = replace(request, device=found["device"])
    convolutions = layer_sweep.expand(request)
    if args.dry_run:
        stdout().print(_table(convolutions))
        return 0
    folder = args.results / found["folder"]
    results.check_writable(folder, SHEET)
    found = results.record_survey(folder, found)
    rounds = args.rounds or ROUNDS[found["device"].split(":")[0]]
    options = Options(
        seconds=0, min_rounds=rounds, max_rounds=rounds, threads=args.threads,
        timeout_s=args.timeout,
    )  # fmt: skip
    console.print(
        f"{found['facts']['device_name']}: {len(convolutions)} distinct convolutions, "
        f"{len(providers)} providers"
    )
    rows = run_convolutions(convolutions, providers, options, folder, found, console)
    if args.csv:
        sys.stdout.write(line(SHEET.columns))
        sys.stdout.writelines(line(map(neutral, row.values())) for row in rows)
    if not args.no_report:
        from resfuse.bench.report import write_report, written

        console.print(written(write_report(folder)))
    return 0


def run_convolutions(
    convolutions: list[Convolution],
    providers: list[str],
    options: Options,
    folder: Path,
    found: dict[str, Any],
    console: Console,
) -> list[Row]:
    """Measures convolutions with a progress bar and appends their rows, which are also returned."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    done: list[Row] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(convolutions))

        def started(convolution: Convolution) -> None:
            progress.update(task, description=convolution.label())

        def finished(convolution: Convolution, rows: list[Row]) -> None:
            done.extend(rows)
            progress.console.print(_line(convolution, rows), highlight=False, soft_wrap=True)
            progress.advance(task)

        layer_sweep.run(convolutions, providers, options, folder, found, started, finished)
    counts = Counter(str(row["status"]) for row in done)
    summary = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    console.print(f"{len(done)} rows in {folder / SHEET.file}: {summary}")
    return done


def _line(convolution: Convolution, rows: list[Row]) -> str:
    """Returns a convolution as a line: eager's time, the others' speed-ups, and which failed."""
    parts = []
    for row in rows:
        name = row["provider"]
        if row["status"] == "pass":
            speedup = "" if name == BASELINE else f" {row['speedup']:.2f}x"
            parts.append(f"{name} {row['p50_ms']:.3f} ms{speedup}")
        elif row["status"] != "unavailable":
            parts.append(f"{name} {row['status']}: {row['error']}")
    return f"{convolution.label():<46} x{convolution.count}: {', '.join(parts) or 'nothing ran'}"


def _table(convolutions: list[Convolution]) -> Table:
    """Returns the table that `--dry-run` shows."""
    title = f"{len(convolutions)} distinct convolutions"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for heading in ("model", "shape", "first layer", "precision"):
        table.add_column(heading, no_wrap=True)
    for heading in ("count", "GMACs"):
        table.add_column(heading, justify="right")
    for one in convolutions:
        gmacs = f"{one.problem.macs / 1e9:.3f}"
        table.add_row(one.model, one.shape, one.layer, one.precision, str(one.count), gmacs)
    return table


def _request(args: argparse.Namespace) -> Request:
    return Request(
        profile="quick",
        device=args.device,
        models=args.model,
        backends=["eager"],
        batch_sizes=args.batch_size,
        precisions=args.precision,
        img_size=args.img_size,
        model_kwargs=tuple(args.model_kwargs),
        input_shape=args.input_shape,
    )
