"""`resfuse layers MODEL`: `resfuse kernels` and `resfuse bench` on one network, side by side.

Every distinct convolution by every provider, then the whole network by each provider's backend, in
one go on one machine; rows are appended as by those commands. What is printed is made of the rows.
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from resfuse.bench.backends.providers import PROVIDERS
from resfuse.bench.common.console import stderr, stdout
from resfuse.bench.common.selection import pick
from resfuse.bench.layers.kernels_command import ROUNDS, run_convolutions
from resfuse.bench.layers.layers_table import notes, table
from resfuse.bench.models.sources import choose_one
from resfuse.bench.records import results
from resfuse.bench.records.case import Case, Options, Request
from resfuse.bench.records.convolutions import every
from resfuse.bench.records.layer_row import SHEET
from resfuse.bench.records.precision_names import pick_precision
from resfuse.bench.report.data.kernel_rows import workloads
from resfuse.bench.report.data.select import read_folders
from resfuse.bench.report.data.workload import Workload
from resfuse.bench.report.tables.reconcile import Reconciled, reconcile
from resfuse.bench.running import sweep
from resfuse.bench.running.session import run_cases
from resfuse.bench.running.survey import survey

LEAST_COLUMNS = 200  # in fewer, rich leaves numbers out; a terminal wraps the lines instead
# What a network is measured at where nothing else is said: (batch size, precision).
DEFAULTS = {"cpu": (8, "float32"), "cuda": (256, "float16")}


def layers(args: argparse.Namespace) -> int:
    """Measures, appends the rows and prints the table."""
    console = stderr()
    providers = pick("--providers", args.providers or ["*"], list(PROVIDERS))
    asked = _request(args)
    sweep.expand(replace(asked, device="cpu"))  # finds misspelt names before anything runs
    results.check_writable(args.results)
    with console.status("Looking at this machine: device, versions, ceilings"):
        found = survey(asked, args.threads, ceilings=True)
    kind = found["device"].split(":")[0]
    batch_size, precision = DEFAULTS[kind]
    request = replace(
        asked, device=found["device"], batch_sizes=asked.batch_sizes or [batch_size],
        precisions=asked.precisions or [precision],
    )  # fmt: skip
    (case,) = sweep.expand(request)
    folder = args.results / found["folder"]
    results.check_writable(folder, SHEET)
    found = results.record_survey(folder, found)
    rounds = args.rounds or ROUNDS[kind]
    options = Options(args.seconds, threads=args.threads, timeout_s=args.timeout)
    each = replace(options, seconds=0, min_rounds=rounds, max_rounds=rounds)
    rows = run_convolutions(every([case]), providers, each, folder, found, console)
    (workload,) = workloads(rows)
    cases = _whole(case, workload.providers)
    if cases:
        run_cases(cases, options, folder, found, console)
    reconciled = _reconciled(workload, folder, found["env_id"], case)
    out = stdout()
    out.width = max(out.width, LEAST_COLUMNS)
    title = f"{case.model}, {case.size_text()}, batch {case.batch_size}, {case.precision}"
    out.print(f"{found['facts']['device_name']}: {title}\n", highlight=False, soft_wrap=True)
    if workload.providers:
        out.print(table(workload, reconciled))
    for note in notes(workload, reconciled):
        out.print(note, highlight=False, soft_wrap=True)
    return 0


def _request(args: argparse.Namespace) -> Request:
    return Request(
        profile="quick",
        device=args.device,
        models=[choose_one("MODEL", args.model, args.model_kwargs)],
        backends=["eager"],
        batch_sizes=[] if args.batch_size is None else [args.batch_size],
        precisions=[pick_precision(args.precision)] if args.precision else [],
        img_size=args.img_size,
        input_shape=args.input_shape,
    )


def _whole(case: Case, providers: Iterable[str]) -> list[Case]:
    """Returns the cases of the whole network, one for each way to run it that a provider stands
    for."""
    ways = dict.fromkeys(way for name in providers if (way := PROVIDERS[name].whole))
    return [replace(case, backend=backend, memory_format=format) for backend, format in ways]


def _reconciled(workload: Workload, folder: Path, env_id: str, case: Case) -> list[Reconciled]:
    """Reconciles layers and networks by the latest row of each case in this environment."""
    measured = [
        comparison
        for environment in read_folders([folder])
        for comparison in environment.comparisons
        if environment.env_id == env_id
        and (comparison.setting.weights, comparison.setting.images) == (case.weights, case.images)
        and comparison.setting.baseline == f"{case.baseline} {case.baseline_memory_format}"
    ]
    return reconcile(workload, measured)
