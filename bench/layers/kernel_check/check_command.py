"""`resfuse check`: is every configuration of every kernel right on this device? Nothing is timed.

A row of configs.csv each, appended the moment it is known. A configuration that crashes or hangs
costs its own row: the others are tried in the next subprocess.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console

from resfuse.bench.common.console import stderr
from resfuse.bench.common.errors import Unavailable, UsageError
from resfuse.bench.common.selection import pick
from resfuse.bench.layers.kernel_check import trials_process
from resfuse.bench.records import results
from resfuse.bench.records.case import Request
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.results import SETTLED
from resfuse.bench.records.sheet import ENDED, Sheet, stamp_of
from resfuse.bench.running.survey import survey

TRIED = ("kernel", "label", "math_mode")
COLUMNS = (
    *TRIED, "device_name", "rel_l2_err", "max_abs_err", *ENDED,
)  # fmt: skip
NUMBERS = frozenset(("rel_l2_err", "max_abs_err", "schema_version"))
SHEET = Sheet("configs.csv", COLUMNS, frozenset(COLUMNS) - NUMBERS, "resfuse check")
LEAST_S = 5.0  # about what the subprocess needs to import torch
Heard = Callable[[dict[str, Any]], None]
# trials_process.run_trials: kernels, math modes, device, keys to skip, seconds, heard
RunTrials = Callable[
    [Sequence[str], Sequence[str], str, Sequence[str], float, Heard], Outcome | None
]


def check(args: argparse.Namespace) -> int:
    """Tries them all and says which are wrong; returns 1 if any is."""
    console = stderr()
    kernels, modes = kernels_of(args), math_modes_of(args)
    results.check_writable(args.results, SHEET)
    with console.status("Looking at this machine: device, versions"):
        found = survey(_request(args.device), 0, ceilings=False)
    folder = args.results / found["folder"]
    results.record_environment(folder, found["env_id"], found["facts"])
    try:
        counts, _ = check_configs(kernels, modes, folder, found, console, args.resume)
    except Unavailable as error:
        raise UsageError(str(error)) from None
    return int(bool(set(counts) - {"pass", "unavailable"}))


def kernels_of(args: argparse.Namespace) -> list[str]:
    """Returns the kernels that the flags name, and raises UsageError for an unknown one."""
    from resfuse.kernels.gpu.registry import KERNELS

    return pick("--kernel", args.kernel, list(KERNELS))


def math_modes_of(args: argparse.Namespace) -> list[str]:
    """Returns the math modes that the flags name, and raises UsageError for an unknown one."""
    from resfuse.kernels.ops.conv_problem import MATH_MODES

    return pick("--math-mode", args.math_mode, [*MATH_MODES, "int8"])


def check_configs(
    kernels: Sequence[str],
    modes: Sequence[str],
    folder: Path,
    found: dict[str, Any],
    console: Console,
    resume: bool,
    time_left: Callable[[], float] = lambda: inf,
    run_trials: RunTrials | None = None,
) -> tuple[Counter[str], bool]:
    """Tries every configuration of the kernels in those math modes and appends a row for each.

    Args:
        found: the survey of this machine (survey.py).
        resume: skip what this environment and commit have settled.
        time_left: seconds it may still take; what is cut off by it leaves no row.
        run_trials: what tries them (default: trials_process.run_trials).

    Returns:
        how many ended with which status; whether all were tried.

    Raises:
        Unavailable: kernels are to be interpreted, and Triton's interpreter does not run here.
        RuntimeError: the subprocess dies before it tries anything.
    """
    if found["device"] == "cpu":
        _require_interpreter(found["facts"])
    skip = _settled(folder, found) if resume else set()
    counts: Counter[str] = Counter()
    under_way: list[str] = []  # at most one
    say = partial(console.print, highlight=False, soft_wrap=True)

    def append(key: str, status: str, error: str, metrics: dict[str, Any]) -> None:
        kernel, math_mode, label = key.split("|")
        tried = {"kernel": kernel, "label": label, "math_mode": math_mode}
        row = SHEET.record(tried, Outcome(status, error, metrics), stamp_of(found))
        results.append_row(folder, row, SHEET)
        counts[status] += 1
        skip.add(key)
        if status not in ("pass", "unavailable"):
            console.print(
                f"{kernel} {math_mode} {label}: {status}: {error}", highlight=False, soft_wrap=True
            )

    def heard(message: dict[str, Any]) -> None:
        under_way.clear()
        if "began" in message:
            under_way.append(message["began"])
        else:
            append(message["key"], message["status"], message["error"], message["metrics"])

    finished = False
    while not finished and time_left() >= LEAST_S:
        before = len(skip)
        died = (run_trials or trials_process.run_trials)(
            kernels, modes, found["device"], sorted(skip), time_left(), heard
        )
        if died is None:
            finished = True
        elif time_left() < LEAST_S:
            break
        elif under_way:
            append(under_way.pop(), died.status, died.error, {})
        elif len(skip) == before:
            raise RuntimeError(f"no configuration can be tried: {died.error}")
    summary = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    left_out = "" if finished else "; the others are left out for want of time"
    where = folder / SHEET.file
    say(f"{counts.total()} configurations in {where}: {summary or 'nothing to try'}{left_out}")
    return counts, finished


def _require_interpreter(facts: Mapping[str, str]) -> None:
    from resfuse.kernels.gpu.common.launch import refusal_of_interpreter

    if reason := refusal_of_interpreter(facts["triton"], facts["numpy"]):
        raise Unavailable(reason)


def _settled(folder: Path, found: dict[str, Any]) -> set[str]:
    if not results.has_rows(folder, SHEET):
        return set()
    rows = results.read_rows(folder, SHEET)
    here = rows[(rows.env_id == found["env_id"]) & (rows.commit == found["commit"])]
    here = here[here.status.isin(SETTLED)]
    return {"|".join((row.kernel, row.math_mode, row.label)) for row in here.itertuples()}


def _request(device: str) -> Request:
    return Request(
        profile="quick", device=device, models=["resnet18"], backends=["eager"], batch_sizes=[1],
        precisions=["float32"],
    )  # fmt: skip
