"""`resfuse study contention`: every backend beside busy processes, and called by several threads.

Each backend has a process of its own, set up once; the processes take turns, so that the rounds of
all of them share what the machine was doing. A backend that waits for a thread that the scheduler
has put aside pays with whole ticks of the scheduler (4 ms on most Linux systems) a layer.
"""

import argparse
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product

import torch

from resfuse.bench.backends import BACKENDS
from resfuse.bench.common.errors import Unavailable, UsageError
from resfuse.bench.common.selection import pick, pick_one
from resfuse.bench.common.statistics import paired_speedup, percentile
from resfuse.bench.measuring.clock.timing import Watch, seconds
from resfuse.bench.measuring.probes import machine
from resfuse.bench.records import results
from resfuse.bench.records.sample import Value
from resfuse.bench.records.sheet import Sheet
from resfuse.bench.running.worker import die_with_parent
from resfuse.bench.studies.contention import contention_table, subject
from resfuse.bench.studies.contention.neighbours import busy
from resfuse.bench.studies.contention.scenarios import QUIET, SCENARIOS
from resfuse.bench.studies.contention.subject import Turn
from resfuse.bench.studies.models.networks import choose
from resfuse.resnet_ref import MODELS

SHEET = Sheet(
    "contention.csv",
    (
        "model", "backend", "batch_size", "threads", "scenario", "rounds", "runs",
        "latency_p50_ms", "latency_p99_ms", "samples_per_sec", "slowdown", "baseline",
        "speedup", "speedup_ci_low", "speedup_ci_high", "status", "error", "env_id", "commit",
    ),
    frozenset(
        ("model", "backend", "scenario", "baseline", "status", "error", "env_id", "commit")
    ),
    "resfuse study contention",
)  # fmt: skip
LEAST_ROUNDS = 5
END_S = 5.0  # for a process that is done
LIMIT_S = 300.0  # for a backend's set-up, and for a turn
TURN_S = 0.7  # a backend's, some ticks of the scheduler; a network that takes longer runs once


def run(args: argparse.Namespace) -> int:
    """Measures and appends a row for each backend, network, batch and scenario.

    Returns:
        1 if a backend answered wrongly or died.

    Raises:
        UsageError: an unknown name, or a results folder that cannot be written.
    """
    shown_by = "resfuse list models; resfuse study models --list"
    models = choose(args.model, list(MODELS), shown_by)
    backends = pick("--backend", args.backend, list(BACKENDS), "resfuse list backends")
    baseline = pick_one("--baseline", args.baseline, list(BACKENDS))
    if baseline not in backends:
        raise UsageError(f"argument --baseline: {baseline} is not among --backend")
    scenarios = pick("--scenario", args.scenario, list(SCENARIOS))
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    facts = machine.facts("cpu", threads)
    where = {"env_id": machine.env_id(facts), "commit": machine.commit()}
    home = args.results / machine.folder_name(facts)
    results.check_writable(home, SHEET)
    results.record_environment(home, where["env_id"], facts)
    failed = False
    for model, batch_size in product(models, args.batch_size):
        for row in _rows(model, batch_size, threads, backends, baseline, scenarios, args.seconds):
            known = {"model": model, "batch_size": batch_size, "threads": threads}
            results.append_row(
                home, {**dict.fromkeys(SHEET.columns), **known, **row, **where}, SHEET
            )
            print(_line(known | row), flush=True)
            failed = failed or row["status"] == "fail"
    if results.has_rows(home, SHEET):
        page = contention_table.write(home, results.read_rows(home, SHEET, only_whole=True))
        print(f"appended to {home / SHEET.file}, and written out in {page.name}")
    return int(failed)


def _line(row: Mapping[str, Value]) -> str:
    name = f"{row['model']}, batch {row['batch_size']}"
    if row["status"] != "pass":
        return f"{name}: {row['backend']} {row['status']}: {row['error']}"
    ratio = f", {row['speedup']:.2f} times as fast as {row['baseline']}" if "speedup" in row else ""
    return (
        f"{name}, {SCENARIOS[str(row['scenario'])].title}: {row['backend']} "
        f"{row['latency_p50_ms']:.1f} ms (p99 {row['latency_p99_ms']:.1f}){ratio}"
    )


@dataclass
class _Subject:
    """A backend's process, and what it has found in the scenario under way."""

    backend: str
    process: ProcessPoolExecutor
    turns: list[Turn] = field(default_factory=list)
    quiet_ms: float | None = None


def _rows(
    model: str,
    batch_size: int,
    threads: int,
    backends: Sequence[str],
    baseline: str,
    scenarios: Sequence[str],
    least_s: float,
) -> Iterator[dict[str, Value]]:
    """Yields a row for each backend that cannot run, and for each scenario of the others."""
    callers = max(SCENARIOS[name].callers for name in scenarios)
    with ExitStack() as stack:
        subjects: list[_Subject] = []
        for backend in backends:
            process = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), die_with_parent, (os.getpid(),)
            )
            stack.callback(_end, process)
            asked = process.submit(subject.set_up, backend, model, batch_size, threads, callers)
            try:
                asked.result(LIMIT_S)
                subjects.append(_Subject(backend, process))
            except Unavailable as reason:
                yield {"backend": backend, "status": "unavailable", "error": str(reason)}
            except Exception as failure:  # whatever a backend raises is its own row's
                yield _failed(backend, failure)
        for name in scenarios:
            scenario = SCENARIOS[name]
            watch, rounds = Watch(), 0
            with busy(scenario):
                while rounds < LEAST_ROUNDS or seconds(watch.elapsed()) < least_s:
                    for one in subjects if rounds % 2 == 0 else reversed(list(subjects)):
                        asked_turn = one.process.submit(
                            subject.take_turn, scenario.callers, TURN_S, batch_size
                        )
                        try:
                            one.turns.append(asked_turn.result(LIMIT_S))
                        except Exception as failure:
                            yield {"scenario": name, **_failed(one.backend, failure)}
                            subjects = [other for other in subjects if other is not one]
                    rounds += 1
            yield from _found(name, subjects, baseline)
            for one in subjects:
                one.turns.clear()


def _found(name: str, subjects: Sequence[_Subject], baseline: str) -> Iterator[dict[str, Value]]:
    """Yields the rows of a scenario; the first one that is measured is quiet, if that is asked
    for."""
    known = {one.backend: [1 / turn.samples_per_sec for turn in one.turns] for one in subjects}
    for one in subjects:
        latencies = [ms for turn in one.turns for ms in turn.latencies_ms]
        middle = percentile(latencies, 50)
        if name == QUIET:
            one.quiet_ms = middle
        rates = [turn.samples_per_sec for turn in one.turns]
        row: dict[str, Value] = {
            "backend": one.backend, "scenario": name, "rounds": len(one.turns),
            "runs": len(latencies), "latency_p50_ms": middle,
            "latency_p99_ms": percentile(latencies, 99),
            "samples_per_sec": percentile(rates, 50),
            "slowdown": None if one.quiet_ms is None else middle / one.quiet_ms,
            "status": "pass", "error": "",
        }  # fmt: skip
        if baseline in known and one.backend != baseline:
            ratio, low, high = paired_speedup(known[baseline], known[one.backend])
            row |= {"baseline": baseline, "speedup": ratio}
            row |= {"speedup_ci_low": low, "speedup_ci_high": high}
        yield row


def _failed(backend: str, failure: Exception) -> dict[str, Value]:
    if isinstance(failure, BrokenProcessPool):
        said = "the process died"
    elif isinstance(failure, TimeoutError):
        said = f"no answer after {LIMIT_S:g} s"
    else:
        said = f"{type(failure).__name__}: {failure}"
    return {"backend": backend, "status": "fail", "error": " ".join(said.split())[:300]}


def _end(process: ProcessPoolExecutor) -> None:
    """Lets the process clean up after itself, but does not wait for a backend that hangs."""
    workers = list((process._processes or {}).values())
    process.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.join(END_S)
        worker.kill()
