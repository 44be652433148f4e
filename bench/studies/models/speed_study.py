"""`resfuse study models --kinds speed`: all backends in turns on one network after another, a
process for each network and batch; a row for each backend as soon as it is known.

It may be cut off at any moment: the first networks are those that people use most, then families
take turns, and `--resume` goes on where it ended.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

from rich.progress import track

from resfuse.bench.backends import BACKENDS
from resfuse.bench.common.console import stderr
from resfuse.bench.common.selection import pick
from resfuse.bench.measuring.clock.timing import Watch, seconds
from resfuse.bench.measuring.probes import allocator, machine
from resfuse.bench.records import results
from resfuse.bench.records.case import USUAL_PRECISION, Options
from resfuse.bench.records.outcome import Outcome, outcome_from
from resfuse.bench.records.precision_names import pick_precision
from resfuse.bench.records.sample import Value
from resfuse.bench.records.sheet import ENDED, Sheet, stamp_of
from resfuse.bench.running.subprocess_runner import NO_SENSE, compare_watches, run_task
from resfuse.bench.running.sweep import require_positive
from resfuse.bench.studies.models.networks import in_turns

TASK = "resfuse.bench.studies.models.measure_speed:measure_task"
USUAL_SIZE = 224  # pixels a side
ASKED = ("network", "batch_size", "requested_img_size", "precision", "backend")
SPEEDS = Sheet(
    "model_speeds.csv",
    (
        *ASKED, "img_size", "param_count", "infer_gmacs", "macs_fused_pct", "rounds", "p50_ms",
        "speedup", "speedup_ci_low", "speedup_ci_high",
        "engine_speedup", "engine_speedup_ci_low", "engine_speedup_ci_high",
        "rel_l2_err", "setup_s", "rebuild_s", "peak_mem_mb", "other_load", *ENDED,
    ),
    frozenset(
        ("network", "precision", "backend", "status", "error", "env_id", "commit", "timestamp")
    ),
    "resfuse study models --kinds speed",
    frozenset(("precision",)),  # older versions knew float32 alone
)  # fmt: skip
OURS = {"fused", "engine"}
Case = tuple[int, str]  # batch size, network


def measure_all(
    args: argparse.Namespace, networks: Sequence[str], home: Path, facts: Mapping[str, str]
) -> bool:
    """Measures what the flags ask for and appends the rows; prints a line for each backend that
    failed, and how many cases the budget left out.

    Args:
        networks: the wanted ones, in any order.
        home: the results folder of this machine.
        facts: of this machine, and of this process.

    Returns:
        whether one of ours failed other than by refusing.

    Raises:
        UsageError: an unknown backend or precision, a batch size below 1, or a folder that cannot
            be written.
    """
    backends = pick("--backend", args.backend, list(BACKENDS), "resfuse list backends")
    precision = pick_precision(args.precision, quantized=True)
    require_positive("--batch-size", args.batch_size)
    results.check_writable(home, SPEEDS)
    facts = {**facts, "malloc": allocator.described(allocator.keeping(os.environ))}  # as run_task
    env_id = machine.env_id(facts)
    results.record_environment(home, env_id, facts)
    here = {"facts": facts, "env_id": env_id, "commit": machine.commit()}
    cases: list[Case] = list(product(args.batch_size, in_turns(networks)))
    img_size = args.img_size or USUAL_SIZE
    if args.resume:
        known = settled(home, here, img_size, backends, precision)
        cases = [case for case in cases if case not in known]
    options = Options(seconds=args.seconds, timeout_s=args.timeout)
    watch, done = Watch(), 0
    counts: dict[str, Counter[str]] = {backend: Counter() for backend in backends}

    def time_left() -> float:
        return float(args.budget) - seconds(watch.elapsed())

    for batch_size, network in track(cases, "Measuring", console=stderr()):
        if done and time_left() < (args.budget - time_left()) / done:  # as long as the others took
            break
        found = dict(
            outcomes(batch_size, network, img_size, backends, options, time_left, precision)
        )
        if len(found) < len(backends):  # the budget cut it off
            break
        done += 1
        for backend, outcome in found.items():
            asked: dict[str, Value] = {
                "network": network, "batch_size": batch_size, "requested_img_size": img_size,
                "precision": precision, "backend": backend,
            }  # fmt: skip
            results.append_row(home, SPEEDS.record(asked, outcome, stamp_of(here)), SPEEDS)
            counts[backend][outcome.status] += 1
            if outcome.status != "pass":
                print(f"{network}, batch {batch_size}: {backend} {outcome.status}: {outcome.error}")
    for backend, ends in counts.items():
        print(f"{backend}: {', '.join(f'{n} {how}' for how, n in ends.most_common()) or 'none'}")
    if left_out := len(cases) - done:
        print(f"{left_out} of {len(cases)} left out for want of time; --resume goes on from here")
    return any(counts[backend].keys() - {"pass", "unavailable"} for backend in OURS & counts.keys())


def settled(
    home: Path,
    here: Mapping[str, Any],
    img_size: int,
    backends: Sequence[str],
    precision: str = USUAL_PRECISION,
) -> set[Case]:
    """Returns the cases for which this environment and commit have a row of every backend, of
    images of this size and in this precision, that another attempt would only repeat."""
    if not results.has_rows(home, SPEEDS):
        return set()
    rows = results.read_rows(home, SPEEDS, only_whole=True)
    ours = rows[
        (rows.env_id == here["env_id"])
        & (rows.commit == here["commit"])
        & (rows.requested_img_size == img_size)
        & (rows.precision.replace("", USUAL_PRECISION) == precision)
        & rows.status.isin(results.SETTLED)
    ]
    of_each = [
        {
            (int(batch), str(network))
            for batch, network in zip(own.batch_size, own.network, strict=True)
        }
        for own in (ours[ours.backend == backend] for backend in backends)
    ]
    return set.intersection(*of_each)


def outcomes(
    batch_size: int,
    network: str,
    img_size: int,
    backends: Sequence[str],
    options: Options,
    time_left: Callable[[], float] = lambda: inf,
    precision: str = USUAL_PRECISION,
) -> Iterator[tuple[str, Outcome]]:
    """Yields the outcome of every backend on a network, or ends early where no time is left.

    One that crashes or hangs as it is set up costs its own row: the others start again without it.
    """
    left = list(backends)
    while left and (limit_s := min(options.timeout_s, time_left())) > 0:
        news: list[dict[str, Any]] = [{}]  # the last: which backend is being set up
        job = {
            "network": network, "batch_size": batch_size, "img_size": img_size,
            "backends": left, "options": asdict(options), "precision": precision,
        }  # fmt: skip
        told = run_task(TASK, job, limit_s, news.append)
        if not isinstance(told, Outcome):
            yield from _as_told(told, left)
            return
        if told.status == "timeout" and limit_s < options.timeout_s:
            return
        culprit = news[-1].get("backend")
        if culprit not in left:
            yield from ((backend, told) for backend in left)
            return
        yield culprit, replace(told, error=f"as it was set up: {told.error}")
        left.remove(culprit)


def _as_told(told: dict[str, object], backends: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Yields what a process has sent, once its clocks agree with those of this one."""
    try:
        by_name, span_s = told["outcomes"], float(str(told["span_s"]))
        assert isinstance(by_name, dict)
        found = {backend: outcome_from(by_name[backend]) for backend in backends}
    except (ValueError, KeyError, AssertionError):
        found, span_s = dict.fromkeys(backends, NO_SENSE), 0.0
    watched_s = float(str(told["watched_s"]))
    for backend, outcome in found.items():
        yield backend, compare_watches(outcome, span_s, watched_s)
