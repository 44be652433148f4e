"""A study that trains, once it is known what: survey, train, append rows, write the page.

Each training is a subprocess on one CPU thread, as many at once as there are cores: layers of 8
pixels keep no second thread busy, and one thread always adds in the same order, so that a seed
gives the same network whatever else runs.
"""

import argparse
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from resfuse.bench.common.console import stderr, stdout
from resfuse.bench.records import results
from resfuse.bench.records.case import Request
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sheet import Sheet, stamp_of
from resfuse.bench.running.survey import survey
from resfuse.bench.studies.training_process import run_training
from resfuse.bench.trainings import data
from resfuse.bench.trainings.training_row import key, settled
from resfuse.bench.trainings.training_run import Run
from resfuse.kernels.cpu.library import cache_folder

RunsOn = Callable[[str], Sequence[Run]]
Trainer = Callable[[Run, Callable[[dict[str, Any]], None]], Outcome]


def kind_of(asked: str) -> str:
    """Returns the key of PROTOCOLS for what `--data` asks for."""
    return data.DIGITS if asked == data.DIGITS else data.CIFAR


def study(args: argparse.Namespace, runs_on: RunsOn, sheet: Sheet) -> int:
    """Trains what has not been trained yet; returns 1 if a training failed.

    Args:
        args: of the command line, see flags.add_degradation.
        runs_on: the trainings for a device; the last word, once it is known which one there is.
        sheet: where their rows go.
    """
    console = stderr()
    source = args.data
    if not args.dry_run:
        results.check_writable(args.results, sheet)
        if source == data.DOWNLOAD:
            source = str(data.download(cache_folder()))
        data.load(source)  # a damaged file is found before the first minute is spent
    with console.status("Looking at this machine: device, versions"):
        found = survey(_request(args.device), 0, ceilings=False)
    folder = args.results / found["folder"]
    runs, skipped = runs_on(found["device"]), 0
    if args.resume:
        remaining = unsettled(runs, folder, found, sheet)
        skipped, runs = len(runs) - len(remaining), remaining
    if args.dry_run:
        stdout().print(_table(runs, skipped))
        return 0
    results.check_writable(folder, sheet)
    results.record_environment(folder, found["env_id"], found["facts"])
    jobs = args.jobs or (int(found["facts"]["cpu_cores"]) if found["device"] == "cpu" else 1)
    console.print(
        f"{found['facts']['device_name']}: {len(runs)} trainings, {min(jobs, len(runs))} at once"
        + (f", {skipped} already settled" if skipped else "")
    )

    def trainer(one: Run, heard: Callable[[dict[str, Any]], None]) -> Outcome:
        return run_training(one, source, found["device"], args.timeout, heard)

    counts = train_all(runs, trainer, jobs, folder, found, sheet, console)
    if not args.no_report and results.has_rows(folder, sheet):
        from resfuse.bench.report import write_report, written

        console.print(written(write_report(folder)), soft_wrap=True)
    return int(bool(set(counts) - {"pass"}))


def unsettled(
    runs: Sequence[Run], folder: Path, found: dict[str, Any], sheet: Sheet
) -> Sequence[Run]:
    """Returns the trainings that this environment and commit have not finished yet."""
    known = settled(folder, found["env_id"], found["commit"], sheet)
    return [one for one in runs if key(one, sheet) not in known]


def train_all(
    runs: Sequence[Run],
    trainer: Trainer,
    jobs: int,
    folder: Path,
    found: dict[str, Any],
    sheet: Sheet,
    console: Console,
) -> Counter[str]:
    """Trains with a progress bar and appends each row the moment it exists.

    Args:
        trainer: trains one network; tells {"share": 0 to 1} on the way.
        jobs: trainings at once.
        found: the survey of this machine (survey.py).
        sheet: where in the folder the rows go.

    Returns:
        how many ended with which status.

    Raises:
        UsageError: the results folder failed in the middle; the rows so far are kept.
        KeyboardInterrupt: after the trainings under way were killed.
    """
    counts: Counter[str] = Counter()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=console, speed_estimate_period=600,
        disable=not console.is_terminal,
    )  # fmt: skip
    with bar as progress, ExitStack() as stack:
        # In layers times epochs, as time goes; a bar that counts trainings would crawl and jump.
        work = bar.add_task(
            f"0 of {len(runs)} trainings", total=sum(one.depth * one.epochs for one in runs)
        )
        outcomes = _outcomes(runs, trainer, jobs, partial(progress.advance, work))
        stack.callback(outcomes.close)  # a full disk, too, ends the trainings under way
        for one, outcome in outcomes:
            asked = {**one.identity(), "threads": 1}
            results.append_row(folder, sheet.record(asked, outcome, stamp_of(found)), sheet)
            counts[outcome.status] += 1
            progress.update(work, description=f"{counts.total()} of {len(runs)} trainings")
            progress.console.print(_line(one, outcome), highlight=False, soft_wrap=True)
    summary = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    console.print(
        f"{counts.total()} rows in {folder / sheet.file}: {summary}"
        if counts
        else "Nothing left to train.",
        soft_wrap=True,
    )
    return counts


def _outcomes(
    runs: Sequence[Run], trainer: Trainer, jobs: int, advance: Callable[[float], None]
) -> Generator[tuple[Run, Outcome], None, None]:
    """Yields each training as it ends. If the caller stops (Ctrl-C, a full disk), running trainings
    are killed at their next message, and the others are not started."""
    stopped = threading.Event()

    def one_training(one: Run) -> Outcome:
        done = 0.0

        def heard(message: dict[str, Any]) -> None:
            nonlocal done
            if stopped.is_set():
                raise KeyboardInterrupt
            advance((message["share"] - done) * one.depth * one.epochs)
            done = message["share"]

        outcome = trainer(one, heard)
        advance((1 - done) * one.depth * one.epochs)
        return outcome

    # As they end, strictly: as_completed shuffles those that end together, and a failure among them
    # could get ahead of a finished training, whose row would be lost.
    ended: SimpleQueue[Future[Outcome]] = SimpleQueue()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(one_training, one): one for one in runs}
        try:
            for future in futures:
                future.add_done_callback(ended.put)
            for _ in runs:
                future = ended.get()
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            stopped.set()


def _line(one: Run, outcome: Outcome) -> str:
    name = f"{one.model:<20} {one.way:<8} seed {one.seed}"
    if outcome.status != "pass":
        return f"{name}  {outcome.status}: {outcome.error}"
    train, test = (float(outcome.metrics[f"{part}_error_pct"] or 0) for part in ("train", "test"))
    return f"{name}  error in training {train:6.2f} %, in testing {test:6.2f} %"


def _table(runs: Sequence[Run], skipped: int) -> Table:
    """Returns the table that `--dry-run` shows."""
    title = f"{len(runs)} trainings" + (f", {skipped} already settled" if skipped else "")
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("network", no_wrap=True)
    table.add_column("run")
    table.add_column("data")
    for heading in ("seed", "epochs", "batch", "learning rate"):
        table.add_column(heading, justify="right")
    for one in runs:
        numbers = (one.seed, one.epochs, one.batch_size, one.learning_rate)
        table.add_row(one.model, one.way, one.data, *map(str, numbers))
    return table


def _request(device: str) -> Request:
    """Returns a request for the survey: the device, and none of the user's files."""
    return Request(
        profile="quick", device=device, models=["cifar_resnet20"], backends=["eager"],
        batch_sizes=[1], precisions=["float32"],
    )  # fmt: skip
