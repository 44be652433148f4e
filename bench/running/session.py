"""`resfuse bench`: turns flags into cases, measures them, writes the report."""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console

from resfuse.bench.backends import backend
from resfuse.bench.common.console import stderr, stdout
from resfuse.bench.common.errors import UsageError
from resfuse.bench.measuring.arrivals import LEAST_QUERIES
from resfuse.bench.measuring.probes.idle import BUSY_CORES
from resfuse.bench.records import results
from resfuse.bench.records.case import MOST, SERVER, Case, Options, Request
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running import sweep
from resfuse.bench.running.conclusion import (
    beside_other_work,
    by_load,
    cannot_run,
    conditions,
    short_tables,
)
from resfuse.bench.running.listing import cases_table
from resfuse.bench.running.profiles import LEAST_S
from resfuse.bench.running.progress import TimeLeft, bar, expected_s, line, minutes
from resfuse.bench.running.subprocess_runner import run_case
from resfuse.bench.running.survey import survey

AB_CI = 0.02
# With --ci the interval ends a case, and these only where it does not. 2000 rounds: the bootstrap
# of more takes longer than it is worth.
CI_SECONDS, CI_ROUNDS = 60.0, 2000
USUAL_GMACS = 4.0  # a ResNet-50's


def bench_request(args: argparse.Namespace, measure: sweep.Measure = run_case) -> int:
    """Surveys the machine, runs the cases that the flags ask for, writes the report.

    Args:
        measure: what measures a case.
    """
    return measure_all(
        args, lambda device: [replace(request_of(args), device=device)], measure=measure
    )


def measure_all(
    args: argparse.Namespace,
    requests: Callable[[str], list[Request]],
    time_left: Callable[[], float] = lambda: inf,
    measure: sweep.Measure = run_case,
) -> int:
    """Surveys the machine, runs the cases of some requests one after the other, writes the report.

    Args:
        args: device, threads, seconds, seed, timeout, results, resume, dry_run, no_report.
        requests: device -> what to measure on it; at least one, all in the same precisions and
            with the same weights and images.
        time_left: seconds it may still take; cases beyond them are left out.
        measure: what measures a case.
    """

    console = stderr()
    for request in requests("cpu"):  # finds misspelt names before anything runs
        sweep.expand(request)
    if not args.dry_run:
        results.check_writable(args.results)
    with console.status("Looking at this machine: device, versions, ceilings"):
        found = survey(requests(args.device)[0], args.threads, ceilings=not args.dry_run)
    wanted = requests(found["device"])
    cases = list(dict.fromkeys(case for request in wanted for case in sweep.expand(request)))
    folder = args.results / found["folder"]
    skipped = 0
    if args.resume:
        remaining = sweep.unsettled(cases, folder, found)
        skipped, cases = len(cases) - len(remaining), remaining
    if args.dry_run:
        stdout().print(cases_table(cases, skipped))
        return 0
    found = results.record_survey(folder, found)
    options = options_of(args, wanted[0])
    guess = guess_of(options, found)
    console.print(
        f"{found['facts']['device_name']}: {len(cases)} cases"
        + (f", {skipped} already settled" if skipped else "")
        + f", {minutes(sum(map(guess, cases)))}"
    )
    for text in [*cannot_run(found.get("unavailable", {})), conditions(found)]:
        if text:
            console.print(text, highlight=False, soft_wrap=True)
    measured: list[tuple[Case, Outcome]] = []
    left_out = run_cases(
        cases, options, folder, found, console, time_left, measure,
        heard=lambda case, outcome: measured.append((case, outcome)),
    )  # fmt: skip
    if left_out:
        console.print(
            f"{left_out} {'case is' if left_out == 1 else 'cases are'} left out for want of time; "
            "the same command with --resume goes on from here.",
            soft_wrap=True,
        )
    _conclude(measured)
    if not args.no_report and results.has_rows(folder):
        from resfuse.bench.report import write_report, written

        console.print(written(write_report(folder)))
    return 0


def _conclude(measured: Sequence[tuple[Case, Outcome]]) -> None:
    """Prints the short tables, and how many of their rows to doubt."""
    for alike in by_load(measured):
        if not any(outcome.status == "pass" for _, outcome in alike):
            continue
        title, tables = short_tables(alike)
        stdout().print(f"\n{title}", highlight=False, style="bold")
        for table in tables:
            stdout().print(table, highlight=False)
    if text := beside_other_work(measured):
        stderr().print(text, highlight=False, soft_wrap=True)


def request_of(args: argparse.Namespace) -> Request:
    """Returns what the parsed flags of `resfuse bench` ask for.

    Raises:
        UsageError: several processes were asked for, and there is one.
    """
    if args.parallel and not args.world_size:
        raise UsageError(
            f"argument --parallel: {args.parallel} needs processes started by torchrun: "
            "torchrun --nproc-per-node N -m resfuse.bench bench --bench train ..."
        )
    _require_scenario(args)
    request = Request(
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
        model_kwargs=tuple(args.model_kwargs),
        input_shape=args.input_shape,
        scenario=args.scenario,
        qps=args.qps or 0.0,
        latency_bound_ms=args.latency_bound or 0.0,
    )
    sweep.require_cpu(request)
    return _against(request, *args.ab) if args.ab else request


def _require_scenario(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that do not go with the scenario."""
    if args.scenario != SERVER:
        for flag, given in (("--qps", args.qps), ("--latency-bound", args.latency_bound)):
            if given is not None:
                shown = f"{given:g}" if given else MOST
                raise UsageError(f"argument {flag}: {shown}; it goes with --scenario {SERVER}")
        return
    if args.qps is None:
        raise UsageError(
            f"argument --scenario: {SERVER} needs --qps N, or --qps {MOST} with --latency-bound MS"
        )
    if not args.qps and args.latency_bound is None:
        raise UsageError(f"argument --qps: {MOST} needs --latency-bound MS")
    if args.qps and args.latency_bound is not None:
        raise UsageError(
            f"argument --latency-bound: {args.latency_bound:g}; it goes with --qps {MOST}, and "
            f"--qps {args.qps:g} is given"
        )
    paired = {"--ab": args.ab, "--ci": args.ci, "--baseline": args.baseline != "eager"}
    for flag, given in paired.items():
        if given:
            raise UsageError(
                f"argument {flag}: with --scenario {SERVER} each backend is measured by itself, "
                "beside no baseline"
            )
    if args.seed < 0:
        raise UsageError(
            f"argument --seed: {args.seed}; accepted with --scenario {SERVER}: whole numbers from 0"
        )
    if args.qps and (needed_s := LEAST_QUERIES / args.qps) > args.timeout:
        raise UsageError(
            f"argument --qps: {args.qps:g}; the {LEAST_QUERIES} queries that a 99th percentile "
            f"needs take {needed_s:.0f} s, more than --timeout {args.timeout:g}"
        )


def _against(request: Request, a: str, b: str) -> Request:
    """The request for b beside a as its baseline, each in a memory format it takes.

    Raises:
        UsageError: an unknown backend, or --baseline says something else.
    """
    if request.baseline not in ("eager", a):
        raise UsageError(f"argument --baseline: {request.baseline}; with --ab it is the first, {a}")
    accepted_a, accepted_b = (backend(name, "--ab").memory_formats for name in (a, b))
    of_a = request.baseline_memory_format
    return replace(
        request,
        backends=[b],
        baseline=a,
        memory_formats=request.memory_formats or list(accepted_b[:1]),
        baseline_memory_format=of_a if of_a in accepted_a else accepted_a[0],
    )


def options_of(args: argparse.Namespace, request: Request) -> Options:
    options = Options(
        seconds=args.seconds or sweep.profile(request).seconds,
        threads=args.threads,
        seed=args.seed,
        timeout_s=args.timeout,
    )
    if ci := args.ci or (AB_CI if args.ab else None):
        seconds = args.seconds or CI_SECONDS
        return replace(options, seconds=seconds, ci=ci, max_rounds=CI_ROUNDS)
    return options


def run_cases(
    cases: list[Case],
    options: Options,
    folder: Path,
    found: dict[str, Any],
    console: Console,
    time_left: Callable[[], float] = lambda: inf,
    measure: sweep.Measure = run_case,
    expected: Callable[[Case], float] = lambda case: LEAST_S,
    heard: Callable[[Case, Outcome], None] = lambda case, outcome: None,
) -> int:
    """Measures cases with a progress bar; returns how many were left out for want of time.

    Args:
        time_left, expected: as sweep.run takes them.
        heard: told each outcome, after its row has been written.
    """
    counts: Counter[str] = Counter()
    told: set[tuple[str, str]] = set(found.get("unavailable", {}).items())  # at the top
    left = TimeLeft(cases, guess_of(options, found))
    with bar(console) as progress:
        running: list[tuple[Case, float]] = []

        def left_s() -> float:
            case, began = running[-1] if running else (None, 0.0)
            return left.seconds(case, progress.get_time() - began)

        task = progress.add_task("", total=len(cases), left=left_s)

        def started(case: Case) -> None:
            running.append((case, progress.get_time()))
            progress.update(task, description=case.label())

        def finished(case: Case, outcome: Outcome) -> None:
            counts[outcome.status] += 1
            _, began = running.pop()
            unable = outcome.status == "unavailable"
            left.done(case, 0.0 if unable else progress.get_time() - began)
            if not unable or (case.backend, outcome.error) not in told:
                say(line(case, outcome, options.ci))
            if unable:
                told.add((case.backend, outcome.error))
            progress.advance(task)
            heard(case, outcome)

        def say(text: str) -> None:
            progress.console.print(text, highlight=False, soft_wrap=True)

        left_out = sweep.run(
            cases, options, folder, found, started, finished, time_left, measure, expected, say
        )
    summary = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    console.print(
        f"{sum(counts.values())} rows in {folder / results.ROWS}: {summary}"
        if counts
        else "No case was measured."
        if left_out
        else "Nothing left to measure."
    )
    return left_out


def guess_of(options: Options, found: Mapping[str, Any]) -> Callable[[Case], float]:
    """A guess at the seconds a case takes on the machine that a survey found."""
    from resfuse.bench.models.sources import is_ours

    unable = found.get("unavailable", {})
    is_busy = found.get("other_load", 0.0) > BUSY_CORES

    def gmacs(case: Case) -> float:
        if is_ours(case.model):
            return _gmacs(case.model, case.input_shape)
        # the survey has run some; building all would take too long
        return float(found.get("gmacs", {}).get(case.model, USUAL_GMACS))

    def guess(case: Case) -> float:
        if case.backend in unable:
            return 0.0
        return expected_s(case, options.seconds, gmacs(case), is_busy)

    return guess


@cache  # a plan asks before each of its steps, and 0.1 s is spent on making the network
def _gmacs(model: str, input_shape: tuple[int, int, int]) -> float:
    """Returns the 10**9 multiplications of a network of ours for one image [C, H, W]."""
    from resfuse.bench.measuring.probes.roofline import cost
    from resfuse.bench.models.zoo import on_meta

    return cost(on_meta(model), input_shape).macs / 1e9
