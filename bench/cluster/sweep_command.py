"""`resfuse sweep`, once its arguments are parsed: submit, wait, collect, write the report."""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

from rich.console import Console

from resfuse.bench.cluster.collect import Cells, collect
from resfuse.bench.cluster.launchers import LAUNCHERS, Launcher, Resources, require_submitit
from resfuse.bench.cluster.shard import Shard
from resfuse.bench.common.console import stderr, stdout
from resfuse.bench.common.errors import UsageError
from resfuse.bench.measuring.device import resolve_device
from resfuse.bench.records import results
from resfuse.bench.records.case import LATENCY, Load
from resfuse.bench.records.case_row import LOAD
from resfuse.bench.running import sweep
from resfuse.bench.running.listing import cases_table
from resfuse.bench.running.session import options_of, request_of

JOBS = "jobs"  # in the results folder: a folder for each launch, and in it one for each job
LOGS = "submitit"
LOOK_S = 2.0


def sweep_on_cluster(args: argparse.Namespace) -> int:
    """Runs the cases as jobs; returns 1 where a job did not come to its end.

    Raises:
        UsageError: bad input, here or on the machines of the jobs.
    """
    require_submitit()
    launcher = LAUNCHERS[args.launcher]
    launcher.require()
    request = replace(request_of(args), device=_device(args))
    cases = sweep.expand(request)
    shards = [cases[i : i + args.shard] for i in range(0, len(cases), args.shard)]
    console = stderr()
    if args.dry_run:
        stdout().print(cases_table(cases, 0))
        print(f"{len(shards)} jobs")
        return 0
    shared = args.results.absolute()
    results.check_writable(shared)
    launch = shared / JOBS / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
    if args.resume:  # what an earlier launch has measured since rows were last collected
        for folder in sorted((shared / JOBS).glob("*/*")):
            collect(folder, shared)
    jobs = [
        Shard(tuple(shard), request, options_of(args, request), launch / str(i),
              shared if args.resume else None)
        for i, shard in enumerate(shards)
    ]  # fmt: skip
    wanted = Resources(
        args.minutes, args.partition, args.account, args.cpus, args.gpus, args.exclusive
    )
    executor = launcher.executor(launch / LOGS, wanted)
    console.print(f"{len(cases)} cases in {len(jobs)} jobs; logs in {launch / LOGS}")

    def show(row: Cells) -> None:
        console.print(_line(row), highlight=False, soft_wrap=True)

    failed = _run(jobs, executor, launcher, shared, show)
    _report(jobs, shared, args.no_report, console)
    for i, why in failed.items():
        line = f"Job {i} of {len(jobs)} failed: {why}"
        console.print(line, highlight=False, soft_wrap=True)
    return int(bool(failed))


def _run(
    shards: list[Shard],
    executor: Any,
    launcher: Launcher,
    shared: Path,
    show: Callable[[Cells], None],
) -> dict[int, str]:
    """Submits as many jobs as may run at once, waits for them, and collects rows as they come.

    Returns:
        number of a job -> why it failed.
    """
    waiting = list(enumerate(shards))
    running: dict[int, Any] = {}
    failed: dict[int, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < launcher.at_once:
                i, shard = waiting.pop(0)
                running[i] = _submit(executor, shard)
            Event().wait(LOOK_S)
            ended = [i for i, job in running.items() if launcher.ended(job)]
            for i in running:  # after the question: an ended job has written all it will
                for row in collect(shards[i].folder, shared):
                    show(row)
            for i in ended:
                if why := _fate(running.pop(i)):
                    failed[i] = why
    except BaseException:  # Ctrl-C above all
        for job in running.values():
            job.cancel(check=False)
        raise
    return failed


def _submit(executor: Any, shard: Shard) -> Any:
    """Raises UsageError where the cluster refuses the job (a partition that is none)."""
    from submitit.core.utils import FailedJobError

    try:
        return executor.submit(shard)
    except FailedJobError as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in said if "error" in line), said[-1])
        raise UsageError(f"the job was refused: {reason[:250]}") from None


def _fate(job: Any) -> str:
    """Returns why an ended job failed, "" if it did not.

    Raises:
        UsageError: the input was at fault.
    """
    if not job.paths.result_pickle.exists():
        return f"it ended without a result (log: {job.paths.stderr})"
    error = job.exception()
    if error is not None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{lines[-1]} (log: {job.paths.stderr})"
    if complaint := job.result():
        raise UsageError(complaint)
    return ""


def _report(shards: list[Shard], shared: Path, no_report: bool, console: Console) -> None:
    folders = {path.parent.name for one in shards for path in one.folder.glob(f"*/{results.ROWS}")}
    if not folders:
        console.print("Nothing was measured.")
    for name in sorted(folders):
        console.print(f"Rows: {shared / name / results.ROWS}", soft_wrap=True)
        if not no_report and results.has_rows(shared / name):
            from resfuse.bench.report import write_report, written

            console.print(written(write_report(shared / name)), soft_wrap=True)


def _device(args: argparse.Namespace) -> str:
    """Returns the device of the jobs' machines; this machine may be without a GPU."""
    if args.device != "auto":
        return str(args.device)
    if args.launcher == "local":
        return resolve_device("auto")
    return "cuda" if args.gpus else "cpu"


def _line(row: Cells) -> str:
    names = ("model", "backend", "memory_format", "precision")
    load = Load(*(row[name] for name in LOAD)).text()
    words = [*(row[name] for name in names), f"batch {row['requested_batch_size']}"]
    case = " ".join([*words, *[load] * (load not in ("", LATENCY))])
    speed = row["infer_samples_per_sec"] or row["train_samples_per_sec"]
    if row["status"] != "pass":
        return f"{case:<58} {row['status']}: {row['error']}"
    line = f"{case:<58} {float(speed):8.1f} images/s"
    if not row["speedup"]:
        return f"{line}  p99 {float(row['p99_ms']):.3g} ms"
    return f"{line}  {float(row['speedup']):.2f}x"
