"""Through the convolutions of a request: measure, append rows, show progress."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from resfuse.bench.records import results
from resfuse.bench.records.case import Options, Request
from resfuse.bench.records.convolutions import Convolution, every
from resfuse.bench.records.layer_row import SHEET, asked
from resfuse.bench.records.outcome import Outcome, outcome_from
from resfuse.bench.records.sample import Value
from resfuse.bench.records.sheet import stamp_of
from resfuse.bench.running import sweep
from resfuse.bench.running.subprocess_runner import NO_SENSE, compare_watches, run_task

Row = dict[str, Value]
TASK = "resfuse.bench.layers.measure_layer:measure_task"


def expand(request: Request) -> list[Convolution]:
    """Returns every distinct convolution of every model, batch size and precision of a request.

    Raises:
        UsageError: an unknown name, a batch or image size below 1.
    """
    alone = replace(request, backends=["eager"], memory_formats=["contiguous"], modes=["inference"])
    return every(sweep.expand(alone))


def run(
    convolutions: Sequence[Convolution],
    providers: Sequence[str],
    options: Options,
    folder: Path,
    found: dict[str, Any],
    started: Callable[[Convolution], None],
    finished: Callable[[Convolution, list[Row]], None],
) -> None:
    """Measures one convolution after the other and appends its rows as soon as they exist.

    Args:
        found: the survey of this machine (see survey.py), recorded in the folder.
        started, finished: called around each convolution, for progress.

    Raises:
        UsageError: the results folder failed in the middle; the rows so far are kept.
    """
    facts = results.read_environments(folder)[found["env_id"]]
    ceilings = {key: float(facts[key]) for key in facts if key.startswith("ceiling_")}
    loners: set[str] = set()
    for convolution in convolutions:
        started(convolution)
        outcomes = _measure(convolution, providers, loners, options, ceilings)
        stamp = stamp_of(found)
        rows = [SHEET.record(asked(convolution, name), outcomes[name], stamp) for name in providers]
        for row in rows:
            results.append_row(folder, row, SHEET)
        finished(convolution, rows)


def _measure(
    convolution: Convolution,
    providers: Sequence[str],
    loners: set[str],
    options: Options,
    ceilings: dict[str, float],
) -> dict[str, Outcome]:
    """Measures all providers in one process, for the pairing, and one that fails there alone.

    A provider that breaks a process (a crash, a hang) is remembered in `loners` and has its own
    from then on: the others' rounds must not be lost each time.
    """
    together = [name for name in providers if name not in loners]
    outcomes = run_convolution(convolution, together, options, ceilings) if together else {}
    alone = [
        name
        for name in providers
        if name in loners
        or (len(together) > 1 and outcomes[name].status not in ("pass", "unavailable"))
    ]
    for name in alone:
        outcomes |= run_convolution(convolution, [name], options, ceilings)
        if outcomes[name].status in ("timeout", "oom", "fail_to_run"):
            loners.add(name)
    return outcomes


def run_convolution(
    convolution: Convolution,
    providers: Sequence[str],
    options: Options,
    ceilings: Mapping[str, float],
) -> dict[str, Outcome]:
    """Measures providers on one convolution, in turns in one subprocess, within the time limit.

    Returns:
        provider -> outcome; the same one for all where the subprocess did not come to an end.

    Raises:
        KeyboardInterrupt: after the subprocess was killed.
    """
    payload = {
        "convolution": convolution.to_plain(),
        "providers": list(providers),
        "options": asdict(options),
        "ceilings": dict(ceilings),
    }
    result = run_task(TASK, payload, options.timeout_s)
    if isinstance(result, Outcome):
        return dict.fromkeys(providers, result)
    try:
        span_s, told = float(result["span_s"]), result["outcomes"]
        outcomes = {name: outcome_from(told[name]) for name in providers}
    except (ValueError, KeyError, TypeError):
        return dict.fromkeys(providers, NO_SENSE)
    watched_s = result["watched_s"]
    return {name: compare_watches(one, span_s, watched_s) for name, one in outcomes.items()}
