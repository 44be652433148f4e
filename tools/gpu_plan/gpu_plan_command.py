"""`resfuse gpu-plan`, once its arguments are parsed: survey, run the steps, write notes and report.

One survey serves all steps, where every `resfuse bench` would make its own: importing torch, waking
the GPU and measuring ceilings take some 20 s each time. Ceilings that a results folder has of this
very environment are not measured again.
"""

import argparse
import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from resfuse.bench.common.console import stderr
from resfuse.bench.common.errors import Unavailable, UsageError
from resfuse.bench.common.output_file import require_place
from resfuse.bench.common.selection import pick
from resfuse.bench.layers.kernel_check.check_command import SHEET as CONFIGS
from resfuse.bench.records import results
from resfuse.bench.records.case import PRECISIONS, Request
from resfuse.bench.running import sweep
from resfuse.tools.gpu_plan import archive, assembler, notes, plan_progress
from resfuse.tools.gpu_plan.execute import TINY_TOLD, Plan, bound_s, cases_of, expected_s
from resfuse.tools.gpu_plan.means import Means, real
from resfuse.tools.gpu_plan.plan_steps import PARTS, STEPS, SURVEY_S, Step
from resfuse.tools.gpu_plan.restore import restore

PACKING_S = 5.0  # kept for the archive and the notes
TERMINATED = 143  # the exit code that a shell gives a process which SIGTERM ended


def gpu_plan(args: argparse.Namespace) -> int:
    """Runs the steps, or lists them, or restores an archive; returns 1 if a step failed."""
    console = stderr()
    if args.restore is not None:
        _require_alone(args)
        return _restore(args.restore, args.results or Path("results"), args.no_report, console)
    steps = chosen_steps(args)
    if args.list:
        print(listing(steps))
        return 0
    return go(args, steps, console, real())


def _require_alone(args: argparse.Namespace) -> None:
    """Raises UsageError for what an archive is not restored with: nothing is measured then."""
    beside = {"--from": args.go_on_from, "--archive": args.archive, "--carried": args.carried}
    for flag, file in beside.items():
        if file is not None:
            raise UsageError(
                f"argument --restore: not with {flag}: --restore puts an archive in its place and "
                "stops, --from goes on measuring from one"
            )


def chosen_steps(args: argparse.Namespace) -> list[Step]:
    """Returns the steps of the parts up to --part that --steps names; UsageError for none."""
    names = pick("--steps", args.steps, [step.name for step in STEPS])
    parts = PARTS[: PARTS.index(args.part) + 1]
    chosen = [step for step in STEPS if step.name in names and step.part in parts]
    if not chosen:
        raise UsageError(f"--steps names no step of the parts up to '{args.part}'")
    return chosen


def listing(steps: Sequence[Step]) -> str:
    """Returns what `--list` shows: each step, its cost, when it would end, its command line."""
    now = SURVEY_S
    lines = [
        "Most valuable first. Seconds are those of an H200 with compiled kernels carried along: of "
        "the step, and from the start to its end. fp8 is left out.",
        f"{SURVEY_S:5.0f} {now:5.0f}  survey: device, versions; 20 more for unknown ceilings",
    ]
    for step in steps:
        now += expected_s(step)
        lines.append(
            f"{expected_s(step):5.0f} {now:5.0f}  {step.name} ({step.part}): {step.measures}; "
            f"{f'predicted {step.predicted}; ' if step.predicted else ''}"
            f"given up after {bound_s(step):.0f}"
        )
        lines.append(f"             resfuse {step.line}" if cases_of(step, "cuda") else "")
    return "\n".join(line for line in lines if line)


def go(args: argparse.Namespace, steps: Sequence[Step], console: Console, means: Means) -> int:
    """The plan itself."""
    require_place("--archive", args.archive, replaced=True)
    root = args.results or _default_results(args.dry_run)
    results.check_writable(root)
    device = "cpu" if args.dry_run else "cuda"
    if args.dry_run:
        console.print(f"Dry run on the CPU: {TINY_TOLD}. Nothing here is a result.")
    with _terminable():
        _bring(args, root, console, means)
        with assembler.chosen() as assembled_by:
            known = results.known_environments(root)
            request = _request(device, steps)
            with console.status("Looking at this machine: device, versions, ceilings"):
                found = _survey(request, args.budget, known, means)
            _say(console, assembled_by)
            return _take_steps(args, steps, root, found, console, means)


def _take_steps(
    args: argparse.Namespace,
    steps: Sequence[Step],
    root: Path,
    found: dict[str, Any],
    console: Console,
    means: Means,
) -> int:
    folder = root / found["folder"]
    results.check_writable(folder)
    results.check_writable(folder, CONFIGS)
    found = results.record_survey(folder, found)
    _say(console, ", ".join(f"{k} {v}" for k, v in {**found["facts"], **found["ceilings"]}.items()))
    for name, reason in found.get("unavailable", {}).items():
        _say(console, f"{name} cannot run here: {reason}")
    known = plan_progress.load(folder, found["env_id"], found["commit"])
    resume = args.resume or args.go_on_from is not None
    if not resume:
        known.ended.clear()
    pack = partial(_pack, args.archive, folder, root, console)
    refresh = partial(pack, with_inductor=False)
    plan = Plan(found, folder, console, means, args.dry_run, resume, refresh)
    try:
        finished = plan_progress.run(
            steps,
            known,
            plan.run_step,
            plan.needs,
            means.clock,
            args.budget - PACKING_S,
            lambda line: console.print(line, style="bold", highlight=False, soft_wrap=True),
            refresh,
        )
        _write_up(folder, console, args.no_report)
    finally:
        with _undisturbed():
            pack()
    if not finished:
        rest = ", ".join(s.name for s in steps if known.ended.get(s.name) != plan_progress.DONE)
        _say(console, f"Not done: {rest}. The same command with --resume goes on from here.")
    return int(any(known.ended.get(step.name) == plan_progress.FAILED for step in steps))


def _bring(args: argparse.Namespace, root: Path, console: Console, means: Means) -> None:
    """Puts what was carried along in its place. Bad kernels cost only the time to compile anew; a
    bad archive is the user's mistake."""
    if args.carried is not None:
        to = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        try:
            said, told = means.unpack(args.carried, to)
            _say(console, said)
            os.environ.update(told)
        except (OSError, ValueError, RuntimeError, Unavailable, EOFError) as error:
            _say(console, f"{args.carried} is of no use, kernels are compiled here: {error}")
    if args.go_on_from is not None:
        for line in restore(args.go_on_from, archive.places(root))[1]:
            _say(console, line)


def _pack(
    file: Path | None, folder: Path, root: Path, console: Console, with_inductor: bool = True
) -> None:
    """Refreshes the archive. Where it cannot be written, the measurements go on all the same."""
    if file is None:
        return
    try:
        said = archive.pack(file, folder, archive.places(root), with_inductor=with_inductor)
    except UsageError as error:
        said = str(error)
    if said:
        _say(console, said)


def _restore(file: Path, root: Path, no_report: bool, console: Console) -> int:
    folders, said = restore(file, archive.places(root))
    for line in said:
        _say(console, line)
    for folder in folders:
        _write_up(folder, console, no_report)
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the plan as Ctrl-C does: its case is killed, its archive written."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    with _handled((signal.SIGTERM, signal.SIGHUP), end):
        yield


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not cost the archive."""
    with _handled((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled(
    numbers: Sequence[signal.Signals],
    handler: Callable[[int, FrameType | None], None] | signal.Handlers,
) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


def _survey(
    request: Request, budget_s: float, known: list[dict[str, str]], means: Means
) -> dict[str, Any]:
    try:
        return means.survey(request, 0, ceilings=True, limit_s=budget_s, known=known)
    except UsageError as error:
        raise UsageError(
            "gpu-plan needs a CUDA device, and torch finds none that works; "
            "`resfuse gpu-plan --dry-run` goes through every step on the CPU"
        ) from error


def _request(device: str, steps: Sequence[Step]) -> Request:
    """Returns a request for the survey: its ceilings and backends, and none of the user's files."""
    cases = [case for step in steps for case in cases_of(step, "cuda")]
    precisions = [name for name in PRECISIONS if any(case.precision == name for case in cases)]
    backends = list(dict.fromkeys(case.backend for case in cases))
    request = Request(
        profile="quick", device=device, models=["resnet50"], backends=backends or ["eager"],
        batch_sizes=[1], precisions=["float32"] if device == "cpu" else precisions or ["float16"],
    )  # fmt: skip
    sweep.expand(request)
    return request


def _default_results(dry_run: bool) -> Path:
    return Path(tempfile.mkdtemp(prefix="resfuse-dry-run-")) if dry_run else Path("results")


def _write_up(folder: Path, console: Console, no_report: bool) -> None:
    """The notes if there are none yet, and the report."""
    if results.has_rows(folder):
        if (path := notes.write_if_missing(folder)) is not None:
            _say(console, f"Notes: {path}")
        if not no_report:
            from resfuse.bench.report import write_report, written

            _say(console, written(write_report(folder)))
    _say(console, f"Results: {folder}")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)
